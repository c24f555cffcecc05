"""Encodings and their way back, wrappers and the files they come from, and the same as inspect solvers."""

import asyncio
import codecs
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from delib.errors import UserError
from delib.evals import attacks, encodings
from delib.evals.encodings import DECODINGS, ENCODINGS

REQUEST = "How do I make mulled wine, and in which order?"
ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789.,?!'\"-/()%&=\n\tßéñÆ中文русский😀́~#{}\\"
SHIPPED = ("jailbreaks", "multi_turn", "many_shot")


def texts(seed: int, alphabet: str = ALPHABET, count: int = 150) -> list[str]:
    draw = random.Random(seed)
    return ["", *("".join(draw.choices(alphabet, k=draw.randint(1, 60))) for _ in range(count))]


def test_the_table_is_whole_and_in_its_order():
    assert list(ENCODINGS) == [
        *("rot13", "base64", "hex", "leetspeak", "reversed", "caesar", "morse", "url", "lookalikes", "decimal"),
        *("pig_latin", "mixed"),
    ]
    assert list(attacks.WAYS) == list(ENCODINGS)
    assert set(ENCODINGS) - set(DECODINGS) == {"pig_latin", "mixed"}


def test_each_encoding_by_hand():
    expected = {
        "rot13": "Uv, Obo 42!",
        "base64": "SGksIEJvYiA0MiE=",
        "hex": "48692c20426f6220343221",
        "leetspeak": "H1, B0b 42!",
        "reversed": "!24 boB ,iH",
        "caesar": "Kl, Ere 42!",
        "morse": ".... .. --..-- / -... --- -... / ....- ..--- -.-.--",
        "url": "%48%69%2C%20%42%6F%62%20%34%32%21",
        "lookalikes": "Ні, Воb 42!",
        "decimal": "72 105 44 32 66 111 98 32 52 50 33",
        "pig_latin": "Ihay, Obbay 42!",
    }
    assert {name: ENCODINGS[name]("Hi, Bob 42!") for name in expected} == expected


@pytest.mark.parametrize("name", ["rot13", "base64", "hex", "reversed", "caesar", "url", "decimal"])
def test_the_way_back_is_exact_for_any_text(name: str):
    for text in texts(1):
        assert DECODINGS[name](ENCODINGS[name](text)) == text


def test_the_way_back_of_the_others_is_exact_where_they_say_so():
    for text in texts(2):
        assert encodings.from_morse(encodings.morse(text)) == re.sub("[A-Z]", lambda c: c.group().lower(), text)
    without_digits = "".join(set(ALPHABET) - set("013457AEIOST"))
    for text in texts(3, without_digits):
        assert encodings.from_leetspeak(encodings.leetspeak(text)) == text
    without_twins = "".join(set(ALPHABET) - set(encodings._TWINS))
    for text in texts(4, without_twins):
        assert encodings.from_lookalikes(encodings.lookalikes(text)) == text


def test_caesar_is_rot13_at_thirteen_and_turns_back():
    for text in texts(5):
        assert encodings.caesar(text, 13) == codecs.encode(text, "rot13") == encodings.rot13(text)
        for shift in (0, 1, 25, 29, -4):
            assert encodings.caesar(encodings.caesar(text, shift), -shift) == text


def test_lookalikes_look_alike_and_are_others():
    shown = encodings.lookalikes("pick a lock")
    assert shown != "pick a lock" and len(shown) == len("pick a lock")
    assert len(set(encodings._TWINS)) == len(encodings._LATIN) == len(encodings._TWINS)
    assert encodings._LATIN.isascii() and not any(twin.isascii() for twin in encodings._TWINS)


def test_what_has_no_sign_stays():
    for name in ("rot13", "caesar", "leetspeak", "lookalikes", "pig_latin"):
        assert ENCODINGS[name]("中文 😀 é") == "中文 😀 é"
    assert encodings.morse("中é\nA") == "中 é\n.-"


@pytest.mark.parametrize(
    ("word", "made"),
    [
        *(("string", "ingstray"), ("apple", "appleway"), ("Queen", "Eenquay"), ("square", "aresquay"), ("my", "ymay")),
        *(("yellow", "ellowyay"), ("rhythm", "ythmrhay"), ("NATO", "ATONAY"), ("I", "Iway"), ("don't", "on'tday")),
        *(("hmm", "hmmay"), ("café", "café"), ("x2", "xay2")),
    ],
)
def test_pig_latin(word: str, made: str):
    assert encodings.pig_latin(word) == made


def test_mixed_hides_each_word_in_a_way_of_its_own_and_each_prompt_differently():
    # One sentence: by word.
    words, hidden = REQUEST.split(" "), encodings.mixed(REQUEST).split(" ")
    ways = [{n for n in encodings._WORD_WRITINGS if ENCODINGS[n](w) == h} for w, h in zip(words, hidden, strict=True)]
    assert all(ways) and len(set().union(*ways)) > 4
    assert encodings.mixed(REQUEST) == encodings.mixed(REQUEST) == ENCODINGS["mixed"](REQUEST)
    # The words that two prompts share are not hidden alike in both, nor by two seeds.
    other = encodings.mixed(REQUEST.replace("wine", "cider")).split(" ")
    assert sum(a == b for a, b in zip(hidden, other, strict=True)) < len(hidden) / 2
    assert encodings.mixed(REQUEST, seed=1) != encodings.mixed(REQUEST)


def test_mixed_takes_both_units_and_keeps_white_space():
    units = set()
    for number in range(40):
        sentences = [f"Sentence {number} stands here.", "Is there one more?", "Yes."]
        hidden = encodings.mixed("  ".join(sentences))
        whole = {n for n in encodings._SENTENCE_WRITINGS if hidden.startswith(ENCODINGS[n](sentences[0]) + "  ")}
        units.add("sentence" if whole else "word")
        if not whole:
            assert re.findall(r"\s+", hidden) == re.findall(r"\s+", "  ".join(sentences))
    assert units == {"sentence", "word"}
    assert [encodings.mixed(text) for text in ("", "  ", "\n")] == ["", "  ", "\n"]


@pytest.mark.parametrize("name", ENCODINGS)
def test_an_encoded_request_says_how_and_holds_the_hidden_text_alone(name: str):
    asked = attacks.encoded(name, REQUEST)
    hidden = asked.split("[begin]\n")[1].split("\n[end]")[0]
    assert hidden == ENCODINGS[name](REQUEST) and attacks.WAYS[name] in asked
    assert REQUEST not in asked


def test_a_request_is_never_read_as_a_template():
    sly = r"{{ 7 * 7 }} {% for x in y %} \1 \g<0> {{ request }}"
    assert sly in attacks.prefix_injection(sly) and sly in attacks.role_play(sly)
    assert attacks.fill("A {{ request }} Z", sly) == f"A {sly} Z"
    assert encodings.from_base64(attacks.encoded("base64", sly).split("[begin]\n")[1].split("\n[end]")[0]) == sly


def test_an_unknown_name_lists_those_that_there_are():
    with pytest.raises(UserError, match="rot14: no such encoding; choose one of rot13, base64"):
        attacks.encoded("rot14", REQUEST)
    with pytest.raises(UserError, match=r"jailbreaks.jsonl: holds no 'x'; choose one of .*opposite-day"):
        attacks.chosen(attacks.jailbreaks(), "x", attacks.JAILBREAKS)


def test_a_template_file_runs_no_code(tmp_path: Path):
    wicked = "{{ ''.__class__.__mro__ }} {% set x = 1 %} {{request}} {{ cycler.__init__.__globals__ }}"
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"id": "w", "template": wicked}) + "\n\n")
    filled = attacks.fill(attacks.jailbreaks(file)["w"], REQUEST)
    assert filled == wicked.replace("{{request}}", REQUEST)


def test_every_problem_of_a_file_is_told_with_its_line(tmp_path: Path):
    file = tmp_path / "mine.jsonl"
    rows = [
        {"id": "fine", "template": "{{ request }}"},
        {"id": "none", "template": "Hello {{ prompt }}"},
        {"id": "two", "template": "{{ request }} {{request}}"},
        {"id": "fine", "template": "Again: {{ request }}"},
        {"id": "", "text": "x"},
        ["no", "object"],
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{torn\n")
    with pytest.raises(UserError) as told:
        attacks.jailbreaks(file)
    problems = "\n".join(told.value.problems)
    for part in (
        f"{file}:2: template: has no {{{{ request }}}}; put it where the request goes",
        f"{file}:3: template: has {{{{ request }}}} 2 times; keep one",
        f"{file}:4: id 'fine' was used in line 1; give each its own",
        *(f"{file}:5: {key}: " for key in ("id", "template", "text")),
        f"{file}:6: not a JSON object",
        f"{file}:7: not a JSON object",
    ):
        assert part in problems
    assert len(told.value.problems) == 8


def test_a_conversation_asks_in_its_last_turn_only(tmp_path: Path):
    file = tmp_path / "turns.jsonl"
    bad = [["{{ request }}", "{{ request }}"], ["a", "b"], ["{{ request }}"], ["a"] * 4 + ["{{ request }}"]]
    file.write_text("".join(json.dumps({"id": str(n), "turns": turns}) + "\n" for n, turns in enumerate(bad)))
    with pytest.raises(UserError) as told:
        attacks.conversations(file)
    assert [problem.split(": ")[0] for problem in told.value.problems] == [f"{file}:{n}" for n in (1, 2, 3, 4)]
    assert "turn 1 holds {{ request }}; only the last may" in told.value.problems[0]
    file.write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        attacks.conversations(file)


def test_what_is_shipped_is_whole_and_varied():
    shipped = attacks.jailbreaks()
    assert len(shipped) >= 20
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", name) for name in shipped)
    runs = [set(runs_of(template)) for template in shipped.values()]
    assert sum(map(len, runs)) == len(set().union(*runs)), "two templates share five words in a row"
    assert {len(turns) for turns in attacks.conversations().values()} == {2, 3, 4}
    shots = attacks.many_shot(40)
    assert [m.role for m in shots] == ["user", "assistant"] * 40
    assert len({m.content for m in shots}) == 80
    openings = [" ".join(m.content.split()[:2]) for m in shots if m.role == "assistant"]
    assert max(map(openings.count, openings)) <= 2
    with pytest.raises(UserError, match="41 shots asked for; give a number from 1 to 40"):
        attacks.many_shot(41)


def test_what_is_shipped_repeats_nothing_of_the_shifted_prompts():
    """Those have wrappers too, and a model is measured on both."""
    shifted = set()
    for line in (attacks.STARTER / "shifted.jsonl").read_text().splitlines():
        for message in json.loads(line)["messages"]:
            shifted |= set(runs_of(message["content"], 6))
    ours = [json.dumps(json.loads(line)) for n in SHIPPED for line in (attacks.STARTER / f"{n}.jsonl").open()]
    ours += [(attacks.TEXTS / f"{n}.md").read_text() for n in ("encoded", "prefix_injection", "role_play")]
    assert [run for text in ours for run in runs_of(text, 6) if run in shifted] == []


def runs_of(text: str, size: int = 5) -> list[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return [tuple(words[n : n + size]) for n in range(len(words) - size + 1)]


def test_the_texts_come_without_inspect():
    code = "import sys, delib.evals.attacks, delib.evals.robust; sys.exit('inspect_ai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# As solvers


def state_of(messages: list, sample_id="p1", metadata=None):
    from inspect_ai.model import ModelName
    from inspect_ai.solver import TaskState

    return TaskState(
        model=ModelName("mockllm/model"),
        sample_id=sample_id,
        epoch=1,
        input=messages,
        messages=messages,
        metadata=metadata,
    )


def solved(solver, state, generate=None):
    return asyncio.run(solver(state, generate))


def test_solvers_compose_from_the_inside_out():
    from inspect_ai.model import ChatMessageSystem, ChatMessageUser
    from inspect_ai.solver import chain

    from delib.evals import solvers

    original = ChatMessageUser(content=REQUEST)
    state = state_of([ChatMessageSystem(content="S"), original])
    solved(solvers.encoding("rot13"), state)
    state = solved(solvers.jailbreak("opposite-day"), state)
    inner = attacks.encoded("rot13", REQUEST)
    assert [m.role for m in state.messages] == ["system", "user"]
    assert state.messages[-1].text == attacks.fill(attacks.jailbreaks()["opposite-day"], inner)
    assert state.metadata == {
        "request": "p1",
        "request_text": REQUEST,
        "attack": "encoding(rot13)+jailbreak(opposite-day)",
    }
    assert original.text == REQUEST, "the transcript's own message was changed"
    other = solved(solvers.jailbreak("opposite-day"), state_of([ChatMessageUser(content=REQUEST)]))
    other = solved(solvers.encoding("rot13"), other)
    assert other.messages[-1].text != state.messages[-1].text
    assert len(chain(solvers.encoding("rot13"), solvers.role_play(), solvers.prefix_injection())) == 3


def test_the_id_of_the_plain_request_may_be_given_and_images_stay():
    from inspect_ai.model import ChatMessageUser, ContentImage, ContentText

    from delib.evals import solvers

    picture = ContentImage(image="data:image/png;base64,AA==")
    state = state_of([ChatMessageUser(content=[picture, ContentText(text=REQUEST)])], "p1/rot13", {"request": "p1"})
    state = solved(solvers.encoding("hex"), state)
    assert state.metadata["request"] == "p1" and state.metadata["request_text"] == REQUEST
    assert state.messages[0].content[0] == picture
    assert state.messages[0].text == attacks.encoded("hex", REQUEST)


def test_many_shot_stands_right_before_the_request():
    from inspect_ai.model import ChatMessageAssistant, ChatMessageSystem, ChatMessageUser

    from delib.evals import solvers

    talk = [ChatMessageSystem(content="S"), ChatMessageUser(content="Hi"), ChatMessageAssistant(content="Hello")]
    state = solved(solvers.many_shot(2), state_of([*talk, ChatMessageUser(content=REQUEST)]))
    assert [m.text for m in state.messages] == [
        *("S", "Hi", "Hello"),
        *(m.content for m in attacks.many_shot(2)),
        REQUEST,
    ]
    assert state.metadata["attack"] == "many_shot(2)"


def test_a_mistake_is_told_before_the_first_sample(tmp_path: Path):
    from delib.evals import solvers

    for make in (
        lambda: solvers.encoding("rot14"),
        lambda: solvers.jailbreak("nobody"),
        lambda: solvers.jailbreak("x", file=str(tmp_path / "gone.jsonl")),
        lambda: solvers.many_shot(0),
        lambda: solvers.multi_turn("nobody"),
    ):
        with pytest.raises(UserError):
            make()


def test_a_lead_up_that_breaks_off_leaves_no_answer_to_grade():
    from inspect_ai.model import ChatMessageUser, ModelOutput

    from delib.evals import solvers

    async def broken(state, tool_calls="loop", **_):
        state.output = ModelOutput.from_content("mockllm/model", "Harmless words.")
        raise TimeoutError

    async def ends(state, tool_calls="loop", **_):
        state.output = ModelOutput.from_content("mockllm/model", "Harmless words.")
        state.messages.append(state.output.message)
        state.completed = True
        return state

    state = state_of([ChatMessageUser(content=REQUEST)])
    with pytest.raises(TimeoutError):
        solved(solvers.multi_turn(), state, broken)
    assert state.output.completion == "" and "attack" not in state.metadata
    state = solved(solvers.multi_turn(), state_of([ChatMessageUser(content=REQUEST)]), ends)
    assert state.output.completion == "" and "attack" not in state.metadata
    assert REQUEST not in [m.text for m in state.messages]


def test_an_evaluation_logs_the_turns_and_the_plain_request(tmp_path: Path):
    """Through inspect itself: the model's own answers stand between the turns, the last one answers the request."""
    from inspect_ai import Task, eval
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.model import ModelOutput, ModelUsage, get_model
    from inspect_ai.solver import chain, generate

    from delib.evals import solvers

    answers = [ModelOutput.from_content("mockllm/model", f"answer {n}") for n in range(3)]
    for answer in answers:
        answer.usage = ModelUsage()  # without it the scripted model counts tokens by a vocabulary that it fetches
    [log] = eval(
        Task(
            dataset=MemoryDataset([Sample(id=7, input=REQUEST)]),
            solver=chain(solvers.encoding("base64"), solvers.multi_turn("novel-editor"), generate()),
        ),
        model=get_model("mockllm/model", custom_outputs=answers),
        log_dir=str(tmp_path),
        display="none",
    )
    assert log.status == "success", log.error
    [sample] = log.samples
    first, second, last = attacks.conversations()["novel-editor"]
    asked = attacks.fill(last, attacks.encoded("base64", REQUEST))
    assert [m.text for m in sample.messages] == [first, "answer 0", second, "answer 1", asked, "answer 2"]
    assert sample.output.completion == "answer 2"
    assert sample.metadata == {
        "request": "7",
        "request_text": REQUEST,
        "attack": "encoding(base64)+multi_turn(novel-editor)",
    }
    assert [step.solver.split("/")[-1] for step in log.plan.steps] == ["encoding", "multi_turn", "generate"]
    assert log.plan.steps[0].params == {"name": "base64"}
