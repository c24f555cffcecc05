"""The attacks as inspect solvers: each dresses the last user message up, or sets messages before it.

They stand before `generate()` in a task, alone or in a chain, and work from the inside out: the first one takes the
plain request, the next what the first has made of it. `chain(encoding("rot13"), jailbreak("opposite-day"))` is a
jailbreak around a request in ROT13; the other way round the jailbreak's own words would be in ROT13 too. `many_shot`
and `multi_turn` leave the last message the request's, so that they go well after the others.

What each leaves in a sample's metadata, for judge and figures: `request`, the id of the plain request (a task whose
samples are themselves one attack on a prompt each sets it before); `request_text`, its text; `attack`, the attacks'
names in their order, joined by +. A sample without `attack` was asked plainly, or was not asked at all.

This module imports inspect_ai, which takes seconds; the texts themselves are in attacks.py, which does not.
"""

from collections.abc import Callable
from pathlib import Path

from inspect_ai.model import ChatMessage, ChatMessageAssistant, ChatMessageUser, ModelOutput
from inspect_ai.solver import Generate, Solver, TaskState, solver

from delib.evals import attacks


@solver
def encoding(name: str) -> Solver:
    """The request in one of the encodings of `delib.evals.encodings.ENCODINGS`, and told so."""
    attacks.encoded(name, "")  # an unknown name is told before the first sample
    return _rewrite(f"encoding({name})", lambda request: attacks.encoded(name, request))


@solver
def jailbreak(id: str, file: str | None = None) -> Solver:
    """The request in a template of the shipped jailbreaks, or of a file of yours in their format."""
    path = Path(file) if file else attacks.JAILBREAKS
    template = attacks.chosen(attacks.jailbreaks(path), id, path)
    return _rewrite(f"jailbreak({id})", lambda request: attacks.fill(template, request))


@solver
def prefix_injection() -> Solver:
    """The request with the demand that the answer begin with a yes."""
    return _rewrite("prefix_injection", attacks.prefix_injection)


@solver
def role_play() -> Solver:
    """The request put to a part in a play."""
    return _rewrite("role_play", attacks.role_play)


@solver
def many_shot(n: int) -> Solver:
    """`n` harmless pairs of a request and an answer that complies, right before the request."""
    shots = attacks.many_shot(n)

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        before, asked, after = _parted(state)
        shown: list[ChatMessage] = [
            ChatMessageUser(content=m.content) if m.role == "user" else ChatMessageAssistant(content=m.content)
            for m in shots
        ]
        state.messages = [*before, *shown, asked, *after]
        _note(state, f"many_shot({n})", asked.text)
        return state

    return solve


@solver
def multi_turn(id: str = "evening-class", file: str | None = None) -> Solver:
    """Harmless turns that lead up to the request, each answered by the model itself, and then the request.

    The last turn is left for the task's `generate()`. Should the sample end on the way there (a limit, an error), its
    completion is empty and its metadata has no `attack`: an answer to a harmless turn is never taken for one to the
    request.
    """
    *early, last = attacks.turns(id, file)

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        before, asked, after = _parted(state)
        state.messages = before
        for turn in early:
            state.messages.append(ChatMessageUser(content=turn))
            try:
                state = await generate(state, tool_calls="none")
            finally:
                state.output = ModelOutput(model=str(state.model))
            if state.completed:
                return state
        state.messages.extend([_worded(asked, attacks.fill(last, asked.text)), *after])
        _note(state, f"multi_turn({id})", asked.text)
        return state

    return solve


def _rewrite(attack: str, dress: Callable[[str], str]) -> Solver:
    async def solve(state: TaskState, generate: Generate) -> TaskState:
        before, asked, after = _parted(state)
        state.messages = [*before, _worded(asked, dress(asked.text)), *after]
        _note(state, attack, asked.text)
        return state

    return solve


def _parted(state: TaskState) -> tuple[list[ChatMessage], ChatMessageUser, list[ChatMessage]]:
    """The messages before the last user message, that one, and those after it."""
    asked = state.user_prompt
    place = next(number for number, message in enumerate(state.messages) if message is asked)
    return list(state.messages[:place]), asked, list(state.messages[place + 1 :])


def _worded(message: ChatMessageUser, text: str) -> ChatMessageUser:
    """A new message with this text and whatever else the old one holds; the transcript may still hold the old one."""
    made = ChatMessageUser.model_validate(message.model_dump(exclude={"id"}))
    made.text = text
    return made


def _note(state: TaskState, attack: str, text: str) -> None:
    state.metadata.setdefault("request", str(state.sample_id))
    state.metadata.setdefault("request_text", text)
    earlier = state.metadata.get("attack")
    state.metadata["attack"] = f"{earlier}+{attack}" if earlier else attack
