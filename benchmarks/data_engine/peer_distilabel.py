"""distilabel: a step that answers, one that makes three rows of an answer, one that judges a row.

A step sends a batch's calls all at once and waits for all of them, so the batch size is how many calls are at once;
the judge is loaded when the teacher has finished. That is the fastest of the ways tried: the pipeline writes down its
whole state after each batch, so that three judge steps, or two steps side by side with the smaller batches that they
would need, take more CPU. Its cache of former runs is off.
"""

import task
from distilabel.models import OpenAILLM
from distilabel.pipeline import Pipeline
from distilabel.steps import LoadDataFromDicts, StepInput, step
from distilabel.steps.tasks import TextGeneration


@step(inputs=["prompt", "answer"], outputs=["run"])
def thrice(inputs: StepInput):
    yield [row | {"run": str(run)} for row in inputs for run in task.READINGS]


def main() -> None:
    given = task.arguments()
    batch = given.concurrency

    def asking(name: str, template: str, columns: list[str], answers: str) -> TextGeneration:
        model = OpenAILLM(
            model="m", base_url=given.address, api_key="mock", generation_kwargs={"max_new_tokens": task.MAX_TOKENS}
        )
        return TextGeneration(
            name=name,
            llm=model,
            template=template,
            columns=columns,
            output_mappings={"generation": answers},
            input_batch_size=batch,
            add_raw_output=False,
            add_raw_input=False,
        )

    with Pipeline(name="benchmark") as pipeline:
        rows = [{"prompt": prompt} for prompt in task.prompts(given.prompts)]
        load = LoadDataFromDicts(name="load", data=rows, batch_size=batch)
        teacher = asking("teacher", task.teacher("{{ prompt }}"), ["prompt"], "answer")
        rows_of_three = thrice(name="thrice", input_batch_size=batch)
        text = task.judge("{{ prompt }}", "{{ answer }}", "{{ run }}")
        judge = asking("judge", text, ["prompt", "answer", "run"], "verdict")
        load >> teacher >> rows_of_three >> judge
    done = pipeline.run(load_groups=[["load", "teacher", "thrice"], ["judge"]], use_cache=False)["default"]["train"]
    task.report(given.prompts, done["answer"][:: task.RUNS], done["verdict"])


if __name__ == "__main__":
    main()
