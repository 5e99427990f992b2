"""Conversations as tokens, and which of them the assistant says."""

import re
from collections.abc import Sequence
from typing import Any

from lorasb_kernels.init.estimation.losses import IGNORED
from lorasb_kernels.train.errors import DataError
from lorasb_kernels.train.samples import Conversation

Tokens = tuple[list[int], list[int]]  # ids, and labels that are IGNORED where nothing is learned
Messages = Sequence[dict[str, Any]]

# For models without a chat template: the plain prompt of one instruction, turn by turn.
PLAIN_CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content }}\n\n"
    "{% elif message.role == 'user' %}"
    "### Instruction:\n{{ message.content }}\n\n### Response:\n"
    "{% elif message.role == 'assistant' %}{% generation %}{{ message.content }}{{ eos_token }}"
    "{% endgeneration %}{% if not loop.last %}\n\n{% endif %}"
    "{% else %}{{ raise_exception('no role ' + message.role + ' without a chat template') }}"
    "{% endif %}{% endfor %}"
)
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Chat:
    """Renders conversations with the chat template of a tokenizer, or plainly without one.

    Args:
        tokenizer: a tokenizer of transformers.
        system_prompt: stands before conversations that have none.
    """

    def __init__(self, tokenizer: Any, system_prompt: str | None):
        self.tokenizer, self.system_prompt = tokenizer, system_prompt
        self.template = tokenizer.get_chat_template() if tokenizer.chat_template else PLAIN_CHAT

    def question(self, conversation: Conversation) -> str:
        """The text that asks for the last response."""
        return self._render(conversation.question, conversation, asks=True)

    def samples(self, conversation: Conversation) -> list[Tokens]:
        """The conversation as training samples: one, where the template permits it.

        The assistant's turns are those that the template marks with `{% generation %}`. Without
        such marks a turn is what its message adds to the text that asks for it. Templates that
        render earlier turns in another way once later ones follow (such as those that drop the
        reasoning) give one sample a turn, each after the text that a generation would see.

        Raises:
            DataError: the template fails, or does not continue the text that asks for a turn.
        """
        if _MARKS.search(self.template):
            return [self._marked(conversation)]
        samples: list[list[tuple[str, bool]]] = []
        done = ""
        for i in conversation.learned:
            asked = self._render(conversation.messages[:i], conversation, asks=True)
            said = self._render(conversation.messages[: i + 1], conversation)
            if not said.startswith(asked):
                raise DataError(
                    "the chat template renders a turn otherwise than it asks for it, so the "
                    "assistant's part cannot be told; expected one that marks it with "
                    "{% generation %}"
                )
            if not samples or not asked.startswith(done):
                samples.append([])
                done = ""
            samples[-1] += [(asked[len(done) :], False), *self._turn(said[len(asked) :])]
            done = said
        return [self._tokens(pieces) for pieces in samples]

    def _turn(self, text: str) -> list[tuple[str, bool]]:
        """A turn, learned up to the token that ends it; what may follow is white space."""
        end = self.tokenizer.eos_token
        spoken = text.rstrip()
        return (
            [(spoken, True), (text[len(spoken) :], False)]
            if spoken.endswith(end)
            else [(text, True)]
        )

    def _tokens(self, pieces: list[tuple[str, bool]]) -> Tokens:
        """Each piece is tokenized alone, as a generation sees its prompt."""
        ids: list[int] = []
        labels: list[int] = []
        for text, learned in pieces:
            tokens = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            ids += tokens
            labels += tokens if learned else [IGNORED] * len(tokens)
        return ids, labels

    def _marked(self, conversation: Conversation) -> Tokens:
        last = conversation.learned[-1] + 1
        encoded = self._apply(
            conversation.messages[:last],
            conversation,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, said = encoded["input_ids"], encoded["assistant_masks"]
        given = 0
        if conversation.given:
            text = self._render(conversation.messages[: conversation.given], conversation, True)
            given = len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        return ids, [
            token if mark and place >= given else IGNORED
            for place, (token, mark) in enumerate(zip(ids, said, strict=True))
        ]

    def _render(self, messages: Messages, conversation: Conversation, asks: bool = False) -> str:
        return self._apply(messages, conversation, tokenize=False, add_generation_prompt=asks)

    def _apply(self, messages: Messages, conversation: Conversation, **options: Any) -> Any:
        opened = messages and messages[0]["role"] == "system"
        if self.system_prompt is not None and not opened:
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        if conversation.tools and self.template is PLAIN_CHAT:
            raise DataError(
                "tools are given; expected a model with a chat template that shows them"
            )
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tools=list(conversation.tools) or None,
                chat_template=self.template,
                **options,
            )
        except DataError:
            raise
        except Exception as error:  # templates raise whatever Jinja and their authors raise
            raise DataError(f"the chat template refuses the messages: {error}") from error
