"""A tool call and its answer, through the official OpenAI client, against a running server (`make serve`)."""

from __future__ import annotations

import json
import sys
from typing import Any

from openai import OpenAI

TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
    client = OpenAI(base_url=url, api_key="none")
    model = client.models.list().data[0].id
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Oslo?"}]
    answer = client.chat.completions.create(model=model, messages=messages, tools=TOOLS, temperature=0, max_tokens=100)
    message = answer.choices[0].message
    if not message.tool_calls:
        print(message.content)
        return
    messages.append(message.model_dump(exclude_none=True))
    for call in message.tool_calls:
        print(f"{call.function.name}({call.function.arguments})")
        result = {"city": json.loads(call.function.arguments).get("city"), "weather": "sunny", "celsius": 21}
        messages.append({"role": "tool", "tool_call_id": call.id, "content": json.dumps(result)})
    final = client.chat.completions.create(model=model, messages=messages, tools=TOOLS, temperature=0, max_tokens=100)
    print(final.choices[0].message.content)


if __name__ == "__main__":
    main()
