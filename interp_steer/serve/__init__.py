"""An OpenAI-compatible server whose requests may each be steered differently, in one batch.

- `app`: the server as an ASGI app.
- `openai_routes`: `/v1/chat/completions`, `/v1/completions`, `/v1/models`.
- `play`: the page's routes; `page/` is the page itself.
- `service`: what stands behind them: a model, and directions by name.
- `body`, `answer`: what a request may hold, and results in OpenAI's words.
- `carriers`: where clients put steering, and what it means in our grammar.
- `worker`, `streams`: the thread that owns the model, and the way of its pieces to a client.
- `readings`: log probabilities, and where a direction shows in a text.
- `session`: a talk with the unsteered and the steered model; the terminal's `chat` holds one too.
- `gate`: who may ask, and how large and slow a request may be.

Start with `interp-steer serve`.
"""
