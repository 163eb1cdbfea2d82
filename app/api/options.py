"""What both of OpenAI's protocols ask for, in the words of a run."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from pydantic import BaseModel
from pydantic_ai import StructuredDict
from pydantic_ai.exceptions import UserError
from pydantic_ai.messages import UserContent

from app.core.errors import Invalid
from app.schemas.chat import (
    Content,
    FileContent,
    Function,
    ImageContent,
    NamedTool,
    TextContent,
)
from app.schemas.response import InputContent, InputFile, InputImage, InputText, NamedFunction
from app.schemas.run import ClientTool
from app.services.attachments import attachment
from app.services.json_schema import MAX_DEPTH, JsonSchema, SchemaRejected, bounded, measure

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
    "logit_bias": "logit_bias",
    "reasoning_effort": "openai_reasoning_effort",
    "verbosity": "openai_text_verbosity",
    "user": "openai_user",
    "safety_identifier": "openai_user",
    "parallel_tool_calls": "parallel_tool_calls",
}
"""A field of a request and PydanticAI's name for it; of two that say the same the later counts."""

FUNCTION = set(ClientTool.model_fields)
OBJECT: dict[str, Any] = {"type": "object", "additionalProperties": True}


def prompt_of(
    content: str | Sequence[Content | InputContent], param: str
) -> str | list[UserContent]:
    """A user's message. Raises Invalid for an attachment that can be none."""
    if isinstance(content, str):
        return content
    return [_part(part, param) for part in content]


def _part(part: Content | InputContent, param: str) -> UserContent:
    match part:
        case ImageContent(image_url=image):
            return attachment(url=image.url, media_type="image/*", detail=image.detail, param=param)
        case InputImage():
            return attachment(
                url=part.image_url,
                file_id=part.file_id,
                media_type="image/*",
                detail="high" if part.detail == "original" else part.detail,
                param=param,
            )
        case FileContent(file=file):
            return attachment(
                file_id=file.file_id, data=file.file_data, name=file.filename, param=param
            )
        case InputFile():
            return attachment(
                url=part.file_url,
                file_id=part.file_id,
                data=part.file_data,
                name=part.filename,
                param=param,
            )
        case TextContent() | InputText():
            return part.text


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
    return [tool.name for tool in only([choice.name], tools)]


def only(names: Sequence[str], tools: Sequence[ClientTool]) -> list[ClientTool]:
    """The tools that `tool_choice` names. Raises Invalid for a name that none of them has."""
    wanted, known = dict.fromkeys(names), {tool.name for tool in tools}
    for name in wanted:
        if name not in known:
            raise Invalid(
                f"tool_choice names {name!r}, which is not in tools.", param="tool_choice"
            )
    return [tool for tool in tools if tool.name in wanted]


def output_of(schema: dict[str, Any], name: str, param: str) -> dict[str, Any]:
    """The options for an answer that fulfils the schema. Raises Invalid, naming the parameter."""
    schema = schema or OBJECT
    try:
        bounded(schema)
        JsonSchema(schema)
        StructuredDict(deepcopy(schema))  # what an agent will make of it
    except SchemaRejected as error:
        error.param = param
        raise
    except UserError as error:
        raise Invalid("The schema must be one of an object.", param=param) from error
    return {"output": schema, "output_name": name}
