# SPDX-License-Identifier: Apache-2.0
"""vLLM's request models with typed visual fields, so that the OpenAPI schema includes them."""

from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from vllm.entrypoints.anthropic.protocol import (
    AnthropicCountTokensRequest,
    AnthropicMessagesRequest,
)
from vllm.entrypoints.openai.chat_completion.protocol import (
    BatchChatCompletionRequest,
    ChatCompletionRequest,
)
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

from flashvlm_vllm.request.refusal import FIELD_REASONS
from flashvlm_vllm.request.request_budget import parse_request_budget
from flashvlm_vllm.request.steering import Steering, parse_steering
from flashvlm_vllm.request.visual_positions import (
    VisualPositions,
    parse_positions,
)
from flashvlm_vllm.serving import metrics, request_log

_TOKENS: dict[str, Any] = {"type": "integer", "minimum": 1}
_FRACTION: dict[str, Any] = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
_TOTAL: dict[str, Any] = {
    "type": "object",
    "properties": {"total": _TOKENS},
    "required": ["total"],
    "additionalProperties": False,
}
BUDGET_SCHEMA: dict[str, Any] = {"anyOf": [_TOKENS, _FRACTION]}

VisualBudget = Annotated[
    Any,
    BeforeValidator(parse_request_budget),
    WithJsonSchema(
        {
            "anyOf": [
                _TOKENS,
                _FRACTION,
                _TOTAL,
                {"type": "string", "enum": ["fit"]},
                {"type": "null"},
            ]
        }
    ),
]


def _one_of(choices: type[StrEnum]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [{"enum": [str(each) for each in choices]}, {"type": "null"}]})


SteeringField = Annotated[Any, BeforeValidator(parse_steering), _one_of(Steering)]
Positions = Annotated[Any, BeforeValidator(parse_positions), _one_of(VisualPositions)]


class VisualFields(BaseModel):
    """The request fields this plugin adds."""

    visual_budget: VisualBudget = Field(
        default=None,
        description=(
            "Visual tokens to keep of each image: a whole number (1 or more), or a fraction "
            'strictly between 0 and 1; {"total": tokens} for all images and videos together; "fit" '
            "for as many as the context has room for. The words of the user decide which. A "
            "content part with an image or a video may have its own. "
            "null turns pruning off for this request; left out, the server's default "
            "(--visual-budget) applies. Also accepted as a string in `metadata`."
        ),
    )
    visual_query: str | None = Field(
        default=None,
        description=(
            "The words that guide the selection, in place of the latest user message. An "
            "empty string selects by visual saliency alone."
        ),
    )
    visual_selector: str | None = Field(
        default=None,
        description=(
            "The method that chooses the tokens, by name; left out or null, the server's default "
            "(--visual-selector) applies. The error for an unknown name lists the installed ones."
        ),
    )
    visual_positions: Positions = Field(
        default=None,
        description=(
            'Positions of kept tokens: "kept", as in the unpruned prompt, or "closed", '
            "consecutive; left out or null, the server's default (--visual-positions, kept) "
            "applies."
        ),
    )

    visual_steering: SteeringField = Field(
        default=None,
        description=(
            "Which words guide the selection of a picture in a conversation: those of the "
            '"message" that brought it, except that pictures of the newest message that has '
            'any follow the latest user message; of the "latest" user message; or of their "own" '
            "message without exception. Left out or null, the server's default "
            "(--visual-steering, message) applies."
        ),
    )

    @model_validator(mode="wrap")
    @classmethod
    def _count_refusal(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Count a request that validation refuses before a handler is called."""
        try:
            return handler(value)
        except ValidationError as error:
            wrong = {each["loc"][0] for each in error.errors() if each["loc"]}
            for field, reason in FIELD_REASONS.items():
                if field in wrong:
                    metrics.count_refusal(reason)
                    request_log.log_refused(reason)
                    break
            raise


class VisualChatCompletionRequest(VisualFields, ChatCompletionRequest):
    """``POST /v1/chat/completions``."""


class VisualResponsesRequest(VisualFields, ResponsesRequest):
    """``POST /v1/responses``."""


class VisualBatchChatCompletionRequest(VisualFields, BatchChatCompletionRequest):
    """``POST /v1/chat/completions/batch``."""

    def to_chat_completion_request(self, messages: list[Any]) -> ChatCompletionRequest:
        """Return the request of one conversation.

        vLLM drops fields that are null, but a null budget means "no pruning".
        """
        request = super().to_chat_completion_request(messages)
        for field in VisualFields.model_fields:
            if field in self.model_fields_set:
                setattr(request, field, getattr(self, field))
        return request


class VisualAnthropicMessagesRequest(VisualFields, AnthropicMessagesRequest):
    """``POST /v1/messages`` and ``POST /v1/messages/render``."""


class VisualAnthropicCountTokensRequest(VisualFields, AnthropicCountTokensRequest):
    """``POST /v1/messages/count_tokens``."""


CHAT = "/v1/chat/completions"
REQUEST_MODELS: dict[str, type[VisualFields]] = {
    CHAT: VisualChatCompletionRequest,
    "/v1/chat/completions/batch": VisualBatchChatCompletionRequest,
    "/v1/responses": VisualResponsesRequest,
    "/v1/messages": VisualAnthropicMessagesRequest,
    "/v1/messages/count_tokens": VisualAnthropicCountTokensRequest,
    "/v1/messages/render": VisualAnthropicMessagesRequest,
}
"""Request models of the routes that take the visual fields. Routes whose models keep unknown fields
(``/tokenize``, ``/invocations``, rendering of chats) take them too, without a description."""
