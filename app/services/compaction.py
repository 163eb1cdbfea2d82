"""Keeps what the model is sent within its window. The history itself stays whole."""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from pydantic_ai import RunContext
from pydantic_ai.messages import (
    BinaryContent,
    ModelMessage,
    ModelRequest,
    ModelRequestPart,
    ModelResponse,
    RetryPromptPart,
    SystemPromptPart,
    TextContent,
    TextPart,
    ToolCallPart,
    ToolReturnPart,
    UserContent,
    UserPromptPart,
)
from pydantic_ai.models import Model, ModelRequestParameters, StreamedResponse
from pydantic_ai.models.wrapper import WrapperModel
from pydantic_ai.settings import ModelSettings
from pydantic_core import to_json
from typing_extensions import TypeIs, override

ANSWER = 8  # one part in so many of the window is kept for the answer, where it asks for no more
STEPS = 4  # what is left out is a multiple of one part in so many of the rest
LARGE, KEPT = 2000, 500  # a tool's result of more characters, once old, is cut to so many

# Tokens.
IMAGE, DOCUMENT, FRAME = 1_000, 10_000, 4  # flat; FRAME is what surrounds each part
BYTES = 4  # of UTF-8 in one token: four letters of English, one of Chinese and a bit
UNDERRATED = 4  # as much larger than this estimate a message may really be, at most


class Compacted(WrapperModel):
    """Sends the model less than the whole history once that would not fit its window.

    First the oldest large results of tools are shortened; where that is not enough, the oldest
    turns are left out, and a note in their place says how many. The last turn, instructions and
    system prompts always stay. It goes in coarse steps and by the history alone, so that requests
    that follow each other begin alike, and providers find that beginning in their caches.

    The run's messages are another list, and stay as they are: what is left out here is still
    stored, shown, and there for a model with a larger window.

    `asked` is called whenever the model is.
    """

    def __init__(self, wrapped: Model, context_tokens: int, asked: Callable[[], None]) -> None:
        super().__init__(wrapped)
        self._asked = asked
        self._window = context_tokens  # for what the model reads and writes together

    def _fitting(
        self,
        messages: list[ModelMessage],
        settings: ModelSettings | None,
        parameters: ModelRequestParameters,
    ) -> list[ModelMessage]:
        answer = (settings or {}).get("max_tokens") or 0
        limit = self._window - min(max(self._window // ANSWER, answer), self._window // 2)
        fixed = _fixed(parameters)
        return compact(messages, limit - fixed, fixed)

    @override
    async def request(
        self,
        messages: list[ModelMessage],
        model_settings: ModelSettings | None,
        model_request_parameters: ModelRequestParameters,
    ) -> ModelResponse:
        self._asked()
        fitting = self._fitting(messages, model_settings, model_request_parameters)
        return await self.wrapped.request(fitting, model_settings, model_request_parameters)

    @override
    @asynccontextmanager
    async def request_stream(
        self,
        messages: list[ModelMessage],
        model_settings: ModelSettings | None,
        model_request_parameters: ModelRequestParameters,
        run_context: RunContext[Any] | None = None,
    ) -> AsyncGenerator[StreamedResponse]:
        self._asked()
        fitting = self._fitting(messages, model_settings, model_request_parameters)
        async with self.wrapped.request_stream(
            fitting, model_settings, model_request_parameters, run_context
        ) as response:
            yield response


def compact(messages: list[ModelMessage], limit: int, fixed: int = 0) -> list[ModelMessage]:
    """The messages in about `limit` tokens; the same list where they fit.

    What the model was told besides them, its instructions and tools, takes `fixed` tokens.
    """
    sizes = measure(messages, fixed)
    if sum(sizes) <= limit:
        return messages
    starts = [at for at, message in enumerate(messages) if _begins_turn(message)]
    if len(starts) < 2:
        return messages
    last = starts[-1]
    step = max(1, limit // STEPS)
    messages = list(messages)
    goal = sum(sizes) - _rounded_up(sum(sizes) - limit, step)
    for at in range(last):
        if sum(sizes) <= goal:
            return messages
        if shorter := _shortened(messages[at]):
            sizes[at] = sizes[at] * estimate(shorter) // estimate(messages[at])
            messages[at] = shorter
    if sum(sizes) <= limit:
        return messages
    goal = _rounded_up(sum(sizes) - limit, step)
    cut = next((at for at in starts[1:] if sum(sizes[:at]) >= goal), last)
    return [_headed(messages[:cut], messages[cut], starts.index(cut)), *messages[cut + 1 :]]


def measure(messages: Sequence[ModelMessage], fixed: int = 0) -> list[int]:
    """The size of each message in tokens: by `estimate`, but where two replies tell how many
    tokens they were given, messages between them are as large as the difference, if that is more.

    A difference is less where one of the two was given a shortened history, and too large where
    the other was; so no message counts for more than UNDERRATED times its estimate.
    """
    sizes = [estimate(message) for message in messages]
    start, before = 0, fixed
    for at, message in enumerate(messages):
        if not isinstance(message, ModelResponse) or not message.usage.input_tokens:
            continue
        rough, real = sum(sizes[start:at]), message.usage.input_tokens - before
        if real > rough > 0:
            real = min(real, UNDERRATED * rough)
            sizes[start:at] = [size * real // rough for size in sizes[start:at]]
        start, before = at, message.usage.input_tokens
    return sizes


def estimate(message: ModelMessage) -> int:
    """Tokens of one message as it is sent: a fourth of its bytes in UTF-8, and a flat cost for
    each image, each document and each part. Thoughts are not sent again."""
    return sum(_estimate(part) for part in message.parts)


def _estimate(part: Any) -> int:
    match part:
        case UserPromptPart(content=content) if not isinstance(content, str):
            return FRAME + sum(_estimate_content(item) for item in content)
        case UserPromptPart(content=str(text)) | SystemPromptPart(content=text):
            return FRAME + _tokens(text)
        case TextPart(content=text):
            return FRAME + _tokens(text)
        case ToolCallPart():
            return FRAME + _tokens(part.tool_name) + _tokens(part.args_as_json_str())
        case ToolReturnPart():
            return FRAME + _tokens(part.model_response_str())
        case RetryPromptPart():
            return FRAME + _tokens(part.model_response())
        case _:
            return 0


def _estimate_content(item: UserContent) -> int:
    match item:
        case str():
            return _tokens(item)
        case TextContent(content=text):
            return _tokens(text)
        case BinaryContent(data=data) if item.media_type.startswith(("text/", "application/json")):
            return len(data) // BYTES
        case BinaryContent() if item.is_image:
            return IMAGE
        case _:
            return DOCUMENT


def _tokens(text: str) -> int:
    return len(text.encode(errors="replace")) // BYTES


def _fixed(parameters: ModelRequestParameters) -> int:
    texts = [part.content for part in parameters.instruction_parts or ()]
    for tool in (*parameters.function_tools, *parameters.output_tools):
        schema = to_json(tool.parameters_json_schema, fallback=str).decode()
        texts += [tool.name, tool.description or "", schema]
    return sum(_tokens(text) for text in texts)


def _rounded_up(tokens: int, step: int) -> int:
    return -(-tokens // step) * step


def _begins_turn(message: ModelMessage) -> bool:
    """Whether a user speaks here, and nothing answers a call: a call and its result stay together,
    also where the user spoke before a run that was stopped had made its calls."""
    return (
        isinstance(message, ModelRequest)
        and any(isinstance(part, UserPromptPart) for part in message.parts)
        and not any(isinstance(part, (ToolReturnPart, RetryPromptPart)) for part in message.parts)
    )


def _shortened(message: ModelMessage) -> ModelMessage | None:
    """The message with the beginnings of its large tool results alone; None without any."""
    if not isinstance(message, ModelRequest) or not any(_is_large(part) for part in message.parts):
        return None
    return replace(message, parts=[_shortened_part(part) for part in message.parts])


def _is_large(part: ModelRequestPart) -> TypeIs[ToolReturnPart]:
    return (
        isinstance(part, ToolReturnPart)
        and part.outcome == "success"
        and len(part.model_response_str()) > LARGE
    )


def _shortened_part(part: ModelRequestPart) -> ModelRequestPart:
    if not _is_large(part):
        return part
    text = part.model_response_str()
    return replace(part, content=f"{text[:KEPT]}\n[{len(text) - KEPT} more characters left out]")


def _headed(left_out: Sequence[ModelMessage], first: ModelMessage, turns: int) -> ModelMessage:
    """The first message that is sent, below the system prompts and a note on what was left out."""
    assert isinstance(first, ModelRequest)  # it begins a turn
    said = "turn was" if turns == 1 else f"{turns} turns were"
    note = f"[The conversation is too long to be read at once: its first {said} left out.]"
    parts: list[ModelRequestPart] = [
        part for message in left_out for part in message.parts if isinstance(part, SystemPromptPart)
    ]
    for part in first.parts:
        if note and isinstance(part, UserPromptPart):
            content = part.content
            together = f"{note}\n\n{content}" if isinstance(content, str) else [note, *content]
            part, note = replace(part, content=together), ""
        parts.append(part)
    return replace(first, parts=parts)
