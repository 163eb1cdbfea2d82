"""What both of OpenAI's protocols ask for, in the words of a run."""

import base64
import binascii
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from pydantic import BaseModel
from pydantic_ai import BinaryContent, StructuredDict
from pydantic_ai.exceptions import UserError
from pydantic_ai.messages import UserContent

from app.core.errors import Invalid
from app.schemas.chat import Function, ImageContent, NamedTool, TextContent
from app.schemas.response import InputImage, InputText, NamedFunction
from app.schemas.run import ClientTool
from app.services.json_schema import MAX_DEPTH, JsonSchema, SchemaRejected, measure

SETTINGS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "max_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "stop": "stop_sequences",
    "seed": "seed",
    "parallel_tool_calls": "parallel_tool_calls",
}
"""A field of a request and PydanticAI's name for it; of two that say the same the later counts."""

FUNCTION = set(ClientTool.model_fields)
OBJECT: dict[str, Any] = {"type": "object", "additionalProperties": True}


def prompt_of(
    content: str | Sequence[TextContent | ImageContent | InputText | InputImage], param: str
) -> str | list[UserContent]:
    """A user's message. Raises Invalid for an image that is none or would have to be fetched."""
    if isinstance(content, str):
        return content
    return [
        _image(part.url, param) if isinstance(part, (ImageContent, InputImage)) else part.text
        for part in content
    ]


def _image(url: str, param: str) -> BinaryContent:
    if not url.startswith("data:"):
        raise Invalid("Images are taken as data URLs; this server fetches none.", param=param)
    try:
        base64.b64decode(url.partition(",")[2], validate=True)
        image = BinaryContent.from_data_uri(url)
    except (ValueError, binascii.Error) as error:
        raise Invalid("That is no data URL of an image.", param=param) from error
    if not image.is_image or not image.data:
        raise Invalid("That is no data URL of an image.", param=param)
    return image


def settings_of(body: BaseModel) -> dict[str, Any]:
    """PydanticAI's model settings; only what was given."""
    return {SETTINGS[name]: value for name, value in body if name in SETTINGS and value is not None}


def tools_of(functions: Sequence[Function]) -> list[ClientTool]:
    """The caller's own functions. Raises Invalid for parameters that no model could be sent."""
    for function in functions:
        if measure(function.parameters)[0] > MAX_DEPTH:
            raise Invalid(f"Parameters are at most {MAX_DEPTH} levels deep.", param="tools")
    return [ClientTool(**function.model_dump(include=FUNCTION)) for function in functions]


def tool_choice_of(
    choice: str | NamedTool | NamedFunction | None, tools: Sequence[ClientTool]
) -> str | list[str] | None:
    if choice is None or isinstance(choice, str):
        return None if choice == "auto" else choice
    if choice.name not in [tool.name for tool in tools]:
        raise Invalid(
            f"tool_choice names {choice.name!r}, which is not in tools.", param="tool_choice"
        )
    return [choice.name]


def output_of(schema: dict[str, Any], name: str, param: str) -> dict[str, Any]:
    """The options for an answer that fulfils the schema. Raises Invalid, naming the parameter."""
    schema = schema or OBJECT
    try:
        JsonSchema(schema)
        StructuredDict(deepcopy(schema))  # what an agent will make of it
    except SchemaRejected as error:
        error.param = param
        raise
    except UserError as error:
        raise Invalid("The schema must be one of an object.", param=param) from error
    return {"output": schema, "output_name": name}
