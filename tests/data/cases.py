"""A tokenizer whose tokens can be read off: one a character, and one for each turn header."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ m['role'][0] }}>{{ m['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}{% if loud %}!{% endif %}"
)


def make_tokenizer(bos=False, template=TEMPLATE):
    """<s>, </s> and the turn headers are one token each."""
    special = ["<pad>", "<s>", "</s>", "<u>", "<a>", "<t>"]
    letters = [chr(code) for code in range(32, 127)]
    vocab = {token: i for i, token in enumerate(special + letters)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=template,
        extra_special_tokens=["<u>", "<a>", "<t>"],
    )  # fmt: skip


TOKENIZER = make_tokenizer()


def ids(text):
    return tuple(ord(letter) - 32 + 6 for letter in text)
