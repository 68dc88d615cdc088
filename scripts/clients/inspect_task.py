"""inspect_ai against `interp-steer serve`: how often do answers name Paris or France?

interp-steer features get starter 2652 --name paris
interp-steer serve --as "paris=add(paris, 0.45 dose) at 13 on prompt" &
pip install inspect_ai openai
export STEER_BASE_URL=http://127.0.0.1:8000/v1 STEER_API_KEY=none
inspect eval scripts/clients/inspect_task.py --model openai-api/steer/starter
inspect eval scripts/clients/inspect_task.py --model openai-api/steer/starter+paris
"""

from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import includes

ASKED = ["Describe a walk through a city.", "Where would you travel?", "Tell me about a museum.",
         "What is a good place for a holiday?", "Describe a famous street.", "Name a city.",
         "Tell me about a river.", "Where did the story begin?"]  # fmt: skip


@task
def paris() -> Task:
    """Eight questions; an answer counts that says Paris."""
    return Task(
        dataset=[Sample(input=text, target="Paris") for text in ASKED],
        scorer=includes(),
        config=GenerateConfig(max_tokens=48, temperature=0),
    )
