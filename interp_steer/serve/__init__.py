"""An OpenAI-compatible server whose requests may each be steered differently, in one batch.

- `app`: the routes: `/v1/chat/completions`, `/v1/completions`, `/v1/models`, health, metrics.
- `body`: what a request may hold, checked.
- `carriers`: where clients put steering, and what it means in our grammar.
- `worker`: the thread that owns the model: a queue before one batch that rows join and leave.
- `answer`: results in OpenAI's words, log probabilities included.
- `gate`: who may ask, and how large and slow a request may be.

Start with `interp-steer serve`, or `create_app(Service.of(model))` for an ASGI server.
"""
