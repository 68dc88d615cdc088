"""OpenAI's own client against `interp-steer serve`: a chat, a stream, and three ways to steer.

interp-steer features get starter 2652 --name paris
interp-steer serve --as "paris=add(paris, 0.45 dose) at 13 on prompt" &
pip install openai; python scripts/clients/talk.py [URL]
"""

import sys

from openai import BadRequestError, OpenAI

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
LINE = "add(paris, 0.45 dose) at 13 on prompt"
client = OpenAI(base_url=URL, api_key="none")
asked = {
    "messages": [{"role": "user", "content": "Describe a walk through a city."}],
    "max_tokens": 32, "temperature": 0,
}  # fmt: skip

plain = client.chat.completions.create(model="starter", **asked)
print("unsteered     ", plain.choices[0].message.content)
field = client.chat.completions.create(model="starter", extra_body={"steering": LINE}, **asked)
print("by a field    ", field.choices[0].message.content)
parts = client.chat.completions.create(model="starter+paris", stream=True, **asked)
print("by model name  ", end="")
for part in parts:
    print(part.choices[0].delta.content or "", end="", flush=True)
hotwire = {"vllm_xargs": {"hotwire": '{"id": "paris", "layer": 13, "scale": 60}'}}
carried = client.chat.completions.create(model="starter", extra_body=hotwire, **asked)
print("\nas to hotwire  ", carried.choices[0].message.content)
try:
    client.chat.completions.create(
        model="starter", extra_body={"steering": LINE.replace("paris", "pariss")}, **asked
    )
except BadRequestError as error:
    print("a mistake     ", error.body["message"][:120])
