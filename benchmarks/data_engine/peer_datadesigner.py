"""NeMo Data Designer: a seed column of prompts, a text column that answers, three text columns that judge the answer.

The endpoint is a custom OpenAI-compatible provider. Verdicts are text columns because its judge columns ask for, and
read, a form of reply of their own. Its health check of the model (a call) and its telemetry are off.
"""

import tempfile

import pandas
import task
from data_designer import config
from data_designer.interface import DataDesigner

GIVEN = task.arguments()

with tempfile.TemporaryDirectory() as folder:
    provider = config.ModelProvider(name="mock", endpoint=GIVEN.address, provider_type="openai", api_key="mock")
    parameters = config.ChatCompletionInferenceParams(
        max_parallel_requests=GIVEN.concurrency, max_tokens=task.MAX_TOKENS
    )
    model = config.ModelConfig(
        alias="m", model="m", provider="mock", inference_parameters=parameters, skip_health_check=True
    )
    columns = config.DataDesignerConfigBuilder(model_configs=[model])
    seeds = pandas.DataFrame({"prompt": task.prompts(GIVEN.prompts)})
    columns.with_seed_dataset(config.DataFrameSeedSource(df=seeds), sampling_strategy=config.SamplingStrategy.ORDERED)
    columns.add_column(config.LLMTextColumnConfig(name="answer", model_alias="m", prompt=task.teacher("{{ prompt }}")))
    for run in task.READINGS:
        text = task.judge("{{ prompt }}", "{{ answer }}", run)
        columns.add_column(config.LLMTextColumnConfig(name=f"verdict_{run}", model_alias="m", prompt=text))
    designer = DataDesigner(artifact_path=folder, model_providers=[provider])
    designer.set_run_config(config.RunConfig(otel_metrics_port=None))
    done = designer.create(columns, num_records=GIVEN.prompts).load_dataset()
    verdicts = (verdict for run in task.READINGS for verdict in done[f"verdict_{run}"])
    task.report(GIVEN.prompts, done["answer"], verdicts)
