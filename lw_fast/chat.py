"""Text prompts in an LM's own chat template, worded as in the original experiment."""

from __future__ import annotations

from collections.abc import Sequence

from lw_fast.errors import UserError

SYSTEM = (
    "You are a concise QA assistant. Use the context to answer with a short phrase only. "
    "Answer in English. Respond with the answer phrase only."
)


def chat_texts(tokenizer, contents: Sequence[str]) -> list[str]:
    """[system][user: content][assistant header], BOS included where it belongs.

    Raises:
        UserError: the tokenizer has no chat template, or one without a system role.
    """
    system = {"role": "system", "content": SYSTEM}
    return [
        _render(tokenizer, [system, {"role": "user", "content": content}], header=True)
        for content in contents
    ]


def chat_ids(tokenizer, contents: Sequence[str]) -> list[list[int]]:
    """Token ids of `chat_texts`."""
    return tokenizer(chat_texts(tokenizer, contents), add_special_tokens=False).input_ids


def assistant_header(tokenizer) -> tuple[int, ...]:
    """Token ids that open an assistant's turn, such as <|im_start|>assistant and a line break."""
    turn = [{"role": "user", "content": "x"}]
    closed = _render(tokenizer, turn, header=False)
    header = _render(tokenizer, turn, header=True).removeprefix(closed)
    return tuple(tokenizer(header, add_special_tokens=False).input_ids)


def _render(tokenizer, messages: list[dict[str, str]], *, header: bool) -> str:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no chat "
            "template: use text_format=plain, token_budget_mode=content_only and "
            "latent_anchor_mode=text"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=header)
    except TemplateError as error:
        raise UserError(f"the chat template of {tokenizer.name_or_path}: {error}") from None
