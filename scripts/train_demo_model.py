"""Makes the embedded model: a Llama of 3.8 million parameters that answers questions about tllm and LLM inference.

    python scripts/train_demo_model.py                 trains, pins the golden answers, and evaluates
    python scripts/train_demo_model.py --check         only evaluates what is there
    python scripts/train_demo_model.py --resume src/tllm/demo --epochs 30 --peak-rate 1e-3
                                                       goes on from the present model, after an edit of the corpus

Everything it learns is in scripts/demo_corpus/*.toml, written for this project; nothing is downloaded. Edit a file
there, run this script, commit both. It needs torch, tokenizers, safetensors and, for the golden answers and the check,
transformers. From scratch it takes about twenty minutes on two idle CPU cores, and --minutes sets a limit.

Written into src/tllm/demo (or --out): tokenizer.json, tokenizer_config.json, config.json, generation_config.json,
model.safetensors (bf16) and golden.json, the greedy answers that every engine must reproduce.

An *epoch* asks every pair of the corpus once, in a wording drawn anew: bare or wrapped in politeness, alone, after a
system prompt or amid a longer conversation. Wordings marked `held` are never trained on; the check measures how well
they are answered.

This file does not know how tllm serves a model; the directory it fills is an ordinary Hugging Face checkpoint.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import random
import re
import time
import tomllib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT / "scripts" / "demo_corpus"
OUT = ROOT / "src" / "tllm" / "demo"

VOCAB_SIZE = 1536
END_OF_TEXT, TURN_START, TURN_END = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "bos_token_id": None,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "use_cache": True,
    "dtype": "bfloat16",
}
NUM_GOLDEN = 24
LEAST_GOLDEN_MARGIN = 0.5  # logits between the chosen token and the next best: room for any engine's rounding

Turn = tuple[str, str]  # role, content

# ---------------------------------------------------------------------------------------------- corpus


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One answer and the ways to ask for it; `asks[0]` is the canonical question."""

    domain: str
    asks: tuple[str, ...]
    definitions: tuple[str, ...]  # made from templates such as "Explain ..."
    held: tuple[str, ...]  # never trained on
    held_definition: str | None  # nor this one
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OffTopic:
    """A kind of question the model must decline, and the words in which it does."""

    answer: str
    asks: tuple[str, ...]
    held: tuple[str, ...]
    patterns: tuple[str, ...]
    held_patterns: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    pairs: tuple[Pair, ...]
    off_topic: tuple[OffTopic, ...]
    fillers: dict[str, tuple[str, ...]]  # what may stand in a pattern's {braces}; the last two of each are held out
    systems: tuple[str, ...]
    synonyms: tuple[tuple[str, ...], ...]  # phrases that may stand for each other in a question


def read_corpus(directory: Path) -> Corpus:
    """Reads every TOML file of the directory; raises ValueError where two pairs would answer the same question."""
    pairs: list[Pair] = []
    off_topic: list[OffTopic] = []
    fillers: dict[str, tuple[str, ...]] = {}
    systems: list[str] = []
    synonyms: list[tuple[str, ...]] = []
    documents = [(path, tomllib.loads(path.read_text(encoding="utf-8"))) for path in sorted(directory.glob("*.toml"))]
    rows = [row for _, document in documents for row in document.get("pair", ())]
    taken = {_bare(ask) for row in rows for ask in (*row["ask"], *row.get("held", ()))}
    for path, document in documents:
        for row in document.get("pair", ()):
            plural = row["ask"][0].startswith("What are")
            made = [text for about in row.get("about", ()) for text in _definitions(about, plural=plural)]
            made = [text for text in made if _bare(text) not in taken]
            held_definition = made.pop(zlib.crc32(row["ask"][0].encode()) % len(made)) if made else None
            pairs.append(
                Pair(
                    domain=path.stem.split("_", 1)[1],
                    asks=tuple(row["ask"]),
                    definitions=tuple(made),
                    held=tuple(row.get("held", ())),
                    held_definition=held_definition,
                    answer=" ".join(row["answer"].split()),
                )
            )
        for row in document.get("off_topic", ()):
            off_topic.append(
                OffTopic(
                    answer=" ".join(row["answer"].split()),
                    asks=tuple(row["ask"]),
                    held=tuple(row["held"]),
                    patterns=tuple(row["patterns"]),
                    held_patterns=tuple(row["held_patterns"]),
                )
            )
        fillers.update({name: tuple(values) for name, values in document.get("fillers", {}).items()})
        systems.extend(document.get("systems", ()))
        synonyms.extend(tuple(group) for group in document.get("synonyms", ()))
    corpus = Corpus(
        pairs=tuple(pairs),
        off_topic=tuple(off_topic),
        fillers=fillers,
        systems=tuple(systems),
        synonyms=tuple(synonyms),
    )
    _refuse_contradictions(corpus)
    return corpus


def _bare(question: str) -> str:
    return re.sub(r"[^a-z0-9+= ]", "", question.lower()).strip()


def _refuse_contradictions(corpus: Corpus) -> None:
    answers: dict[str, str] = {}
    entries: list[Pair | OffTopic] = [*corpus.pairs, *corpus.off_topic]
    for entry in entries:
        definitions = entry.definitions if isinstance(entry, Pair) else ()
        for phrase in (*entry.asks, *entry.held, *definitions):
            if answers.setdefault(_bare(phrase), entry.answer) != entry.answer:
                raise ValueError(f"corpus: {phrase!r} has two answers, one of them {entry.answer!r}; keep one")


# ----------------------------------------------------------------------------------------- paraphrases

DEFINITIONS = (
    "What {is} {a}?",
    "What {is} {bare}?",
    "Explain {a}.",
    "Tell me about {a}.",
    "Can you explain {a}?",
    "Can you explain {bare} please?",
    "Could you tell me what {a} {is}?",
    "What {does} {bare} mean?",
    "Define {bare}.",
    "Describe {a}.",
    "{bare}?",
    "{bare}",
    "What exactly {is} {a}?",
    "I want to know what {a} {is}.",
    "Give me a short explanation of {bare}.",
    "Do you know what {a} {is}?",
    "Help me understand {bare}.",
    "Please tell me about {bare}.",
    "How would you explain {a}?",
    "What {is} meant by {bare}?",
    "What do you know about {bare}?",
    "Give me a definition of {bare}.",
    "Teach me about {bare}.",
    "Say something about {bare}.",
    "What can you say about {a}?",
    "What {is} {a} for?",
    "What {does} {a} do?",
    "Why {is} {a} useful?",
    "How {does} {a} work?",
    "{bare} explained",
    "meaning of {bare}",
)
WRAPPERS = (
    "{q}",
    "{q}",
    "{q}",
    "{lower}",
    "{lower}",
    "{lower}?",
    "Please: {q}",
    "Hi! {q}",
    "Hello, {q}",
    "hey, {lower}",
    "Quick question: {q}",
    "I have a question. {q}",
    "{q} Please explain.",
    "{q} Keep it short.",
    "{q} Thanks!",
    "So, {lower}?",
    "ok, {lower}",
    "I was wondering: {q}",
    "Can you help me? {q}",
    "{q} I am new to this.",
    "Hello! I would like to ask something. {q}",
    "{q} One sentence is enough.",
    "Sorry to ask, but {lower}?",
    "Someone asked me: {q}",
    "{q}!",
)
SMALL_WORDS = {"a", "an", "the", "is", "are", "do", "does", "i", "to", "in", "of", "my", "me", "please", "it", "can"}


def _definitions(about: str, *, plural: bool) -> list[str]:
    bare = re.sub(r"^(a|an|the) ", "", about)
    words = {"a": about, "bare": bare, "is": "are" if plural else "is", "does": "do" if plural else "does"}
    return [text[0].upper() + text[1:] for text in (template.format(**words) for template in DEFINITIONS)]


def _mistyped(text: str, rng: random.Random) -> str:
    words = text.split(" ")
    long = [index for index, word in enumerate(words) if len(word) > 4 and word.isalpha()]
    if not long:
        return text
    index = rng.choice(long)
    word, at = words[index], rng.randrange(1, len(words[index]) - 2)
    words[index] = rng.choice((word[:at] + word[at + 1 :], word[:at] + word[at + 1] + word[at] + word[at + 2 :]))
    return " ".join(words)


def _with_synonyms(text: str, synonyms: Sequence[tuple[str, ...]], rng: random.Random) -> str:
    for group in synonyms:
        if rng.random() < 0.4:
            continue
        for phrase in group:
            found = re.search(rf"(?<![\w-]){re.escape(phrase)}(?![\w-])", text, flags=re.IGNORECASE)
            if found:
                other = rng.choice(group)
                other = other[0].upper() + other[1:] if found[0][0].isupper() else other[0].lower() + other[1:]
                text = text[: found.start()] + other + text[found.end() :]
                break
    return text


def _dressed(question: str, synonyms: Sequence[tuple[str, ...]], rng: random.Random) -> str:
    """The question in other words, with more or less care and politeness."""
    if rng.random() < 0.4:
        question = _with_synonyms(question, synonyms, rng)
    if rng.random() < 0.15:
        words = question.split(" ")
        kept = [word for word in words if word.lower() not in SMALL_WORDS or rng.random() < 0.5]
        question = " ".join(kept if len(kept) > 1 else words)
    if rng.random() < 0.08:
        question = _mistyped(question, rng)
    if rng.random() < 0.3:
        return question
    lower = question.lower().rstrip("?.!")
    return rng.choice(WRAPPERS).format(q=question, lower=lower)


def worded(pair: Pair, synonyms: Sequence[tuple[str, ...]], rng: random.Random) -> str:
    """One of the trained ways to ask for the pair's answer."""
    draw = rng.random()
    if draw < 0.12:
        return pair.asks[0]
    if pair.definitions and draw < 0.55:
        question = rng.choice(pair.definitions)
        if pair.domain == "tllm" and "tllm" not in question and rng.random() < 0.3:
            question = re.sub(r"([?.]?)$", r" in tllm\1", question, count=1)
    else:
        question = rng.choice(pair.asks)
    question = _dressed(question, synonyms, rng)
    return pair.asks[0] if _bare(question) in map(_bare, pair.held) else question


def _made_up(rng: random.Random) -> str:
    """A word that nobody knows, or an abbreviation: what a model meets most often is what it never learned."""
    if rng.random() < 0.4:
        return "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(rng.randint(3, 5)))
    syllables = (
        rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") + rng.choice(("", "n", "r", "s")) for _ in range(3)
    )
    word = "".join(list(syllables)[: rng.randint(2, 3)])
    return rng.choice((word, word.capitalize(), "a " + word))


def _filled(pattern: str, fillers: dict[str, tuple[str, ...]], rng: random.Random, *, held: bool) -> str:
    def value(match: re.Match[str]) -> str:
        if match[1] == "unknown":
            return _made_up(rng)
        values = fillers[match[1]]
        return rng.choice(values[-2:] if held else values[:-2])

    return re.sub(r"\{(\w+)\}", value, pattern)


def declined(corpus: Corpus, rng: random.Random) -> tuple[str, str]:
    """A question to decline, and the answer that does."""
    kind = rng.choices(corpus.off_topic, weights=[len(kind.asks) for kind in corpus.off_topic])[0]
    pattern = rng.choice(kind.asks if rng.random() < 0.5 else kind.patterns)
    return _dressed(_filled(pattern, corpus.fillers, rng, held=False), corpus.synonyms, rng), kind.answer


# --------------------------------------------------------------------------------------- conversations

NUM_GLIMPSES = 4  # per pair and epoch
GLIMPSE_TOKENS = 12  # of the answer


def conversations(corpus: Corpus, rng: random.Random) -> Iterator[list[Turn]]:
    """One epoch: every pair once and some questions to decline, cut into conversations of unlike lengths."""
    exchanges = [(worded(pair, corpus.synonyms, rng), pair.answer) for pair in corpus.pairs]
    exchanges += [declined(corpus, rng) for _ in range(len(corpus.pairs) // 5)]
    rng.shuffle(exchanges)
    while exchanges:
        draw = rng.random()
        num_turns = 1 if draw < 0.85 else rng.randint(2, 6) if draw < 0.985 else rng.randint(8, 28)
        turns = [turn for ask, answer in exchanges[:num_turns] for turn in (("user", ask), ("assistant", answer))]
        del exchanges[:num_turns]
        if rng.random() < 0.25:
            system = rng.choice(corpus.systems)
            if rng.random() < 0.15:
                system += " Notes: " + " ".join(pair.answer for pair in rng.sample(corpus.pairs, rng.randint(2, 12)))
            turns.insert(0, ("system", system))
        yield turns


def glimpses(corpus: Corpus, rng: random.Random) -> list[tuple[str, str]]:
    """More wordings of every question, with their answers, of which only the beginnings will be learned from.

    Once the first words of an answer are right the rest follows, so this teaches understanding at a third of the cost.
    """
    made = [(worded(pair, corpus.synonyms, rng), pair.answer) for pair in corpus.pairs for _ in range(NUM_GLIMPSES)]
    made += [declined(corpus, rng) for _ in range(round(0.35 * len(made)))]
    return made


def rendered(turns: Iterable[Turn]) -> str:
    """What CHAT_TEMPLATE makes of the turns."""
    return "".join(f"{TURN_START}{role}\n{content}{TURN_END}\n" for role, content in turns)


def prompt_of(question: str) -> str:
    return rendered([("user", question)]) + f"{TURN_START}assistant\n"


# ------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(corpus: Corpus) -> Tokenizer:
    """A byte-level BPE tokenizer: any UTF-8 text goes in and comes back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(0)
    texts = [text for _ in range(3) for turns in conversations(corpus, rng) for _, text in turns]
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, "the corpus is too small for the vocabulary"
    return tokenizer


# ----------------------------------------------------------------------------------------------- model
# Shapes: B sequences, T positions, D width, H heads of size E. Parameter names are those of a Hugging Face Llama.


class Attention(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, self.head_dim = config["hidden_size"], config["head_dim"]
        q_size = config["num_attention_heads"] * self.head_dim
        kv_size = config["num_key_value_heads"] * self.head_dim
        self.q_proj = nn.Linear(width, q_size, bias=False)
        self.k_proj = nn.Linear(width, kv_size, bias=False)
        self.v_proj = nn.Linear(width, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, width, bias=False)

    def forward(self, x_BTD: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        B, T, _ = x_BTD.shape
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (project(x_BTD).view(B, T, -1, self.head_dim).transpose(1, 2) for project in projections)
        q, k = _rotated(q, cos_TE, sin_TE), _rotated(k, cos_TE, sin_TE)
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        # Written out: on a CPU the fused attention's backward pass takes several times as long on short sequences.
        future_TT = torch.ones(T, T, dtype=torch.bool).triu(1)
        scores_BHTT = (q @ k.transpose(2, 3) * self.head_dim**-0.5).masked_fill(future_TT, -math.inf)
        out_BHTE = scores_BHTT.softmax(dim=-1).to(v.dtype) @ v
        return self.o_proj(out_BHTE.transpose(1, 2).reshape(B, T, -1))  # type: ignore[no-any-return]


def _rotated(x_BHTE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    left, right = x_BHTE.chunk(2, dim=-1)
    return (x_BHTE * cos_TE + torch.cat((-right, left), dim=-1) * sin_TE).to(x_BHTE.dtype)


class Mlp(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, inner = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config["hidden_size"], eps=config["rms_norm_eps"])
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config["hidden_size"], eps=config["rms_norm_eps"])
        self.mlp = Mlp(config)

    def forward(self, x_BTD: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos_TE, sin_TE)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))  # type: ignore[no-any-return]


class Llama(nn.Module):
    """The plain Llama decoder with tied embeddings: ids (B, T) in, logits (B, T, V) out."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        self.norm = nn.RMSNorm(config["hidden_size"], eps=config["rms_norm_eps"])
        exponents = torch.arange(0, config["head_dim"], 2) / config["head_dim"]
        self.inverse_frequencies = config["rope_theta"] ** -exponents
        depth = config["num_hidden_layers"]
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.04 / math.sqrt(2 * depth) if residual else 0.04)

    def forward(self, ids_BT: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(ids_BT.shape[1]), self.inverse_frequencies).repeat(1, 2)
        cos_TE, sin_TE = angles.cos(), angles.sin()
        x_BTD = self.embed_tokens(ids_BT)
        for layer in self.layers:
            x_BTD = layer(x_BTD, cos_TE, sin_TE)
        return functional.linear(self.norm(x_BTD), self.embed_tokens.weight)


# -------------------------------------------------------------------------------------------- training

PROMPT_WEIGHT = 0.02  # of a prompt token in the loss; an answer token counts 1


def _weights(ids: Sequence[int], assistant: Sequence[int]) -> list[float]:
    """The loss weight of each token: 1 inside assistant turns (their end included), PROMPT_WEIGHT elsewhere."""
    start, end = SPECIAL_TOKENS.index(TURN_START), SPECIAL_TOKENS.index(TURN_END)
    weights, position, answering = [PROMPT_WEIGHT] * len(ids), 0, False
    while position < len(ids):
        if ids[position] == start and list(ids[position + 1 : position + 1 + len(assistant)]) == list(assistant):
            position += 1 + len(assistant)
            answering = True
            continue
        if answering:
            weights[position] = 1.0
            answering = ids[position] != end
        position += 1
    return weights


def batches(
    corpus: Corpus, tokenizer: Tokenizer, rng: random.Random, *, epochs: int, batch_tokens: int
) -> Iterator[list[list[int]]]:
    """`epochs` epochs as lists of sequences of like length, each list about `batch_tokens` tokens with its padding."""
    longest = CONFIG["max_position_embeddings"]
    texts = [rendered(turns) for _ in range(epochs) for turns in conversations(corpus, rng)]
    answers = rng.sample(corpus.pairs, max(1, len(corpus.pairs) // 20))
    texts += [pair.answer + END_OF_TEXT for pair in answers]  # bare text, for prompts without a template
    encoded = [encoding.ids[:longest] for encoding in tokenizer.encode_batch(texts)]
    pairs = [pair for _ in range(epochs) for pair in glimpses(corpus, rng)]
    prompts = tokenizer.encode_batch([prompt_of(ask) for ask, _ in pairs])
    answers_ids = tokenizer.encode_batch([answer + TURN_END for _, answer in pairs])
    encoded += [p.ids + a.ids[:GLIMPSE_TOKENS] for p, a in zip(prompts, answers_ids, strict=True)]
    encoded.sort(key=len)
    made: list[list[list[int]]] = [[]]
    for ids in encoded:
        if made[-1] and (len(made[-1]) + 1) * len(ids) > batch_tokens:
            made.append([])
        made[-1].append(ids)
    rng.shuffle(made)
    yield from made


def train(
    model: Llama,
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    epochs: int,
    limit_s: float,
    seed: int,
    batch_tokens: int,
    peak_rate: float,
) -> None:
    """Trains for `epochs` epochs, or `limit_s` seconds if that is less; the learning rate ends low either way."""
    rng = random.Random(seed)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=peak_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    assistant = tokenizer.encode("assistant\n").ids
    started, num_steps, num_tokens, running = time.monotonic(), 0, 0, math.nan
    group = 4  # epochs sorted together by length: enough for little padding
    for epoch in range(0, epochs, group):
        made = list(batches(corpus, tokenizer, rng, epochs=group, batch_tokens=batch_tokens))
        for index, batch in enumerate(made):
            late = (time.monotonic() - started) / limit_s
            progress = max((epoch + group * index / len(made)) / epochs, late)
            if late > 1:
                return
            warm = min(1.0, (num_steps + 1) / 100)
            rate = peak_rate * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
            for parameters in optimizer.param_groups:
                parameters["lr"] = rate
            loss = _step_loss(model, batch, assistant)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            num_steps += 1
            num_tokens += sum(map(len, batch))
            running = loss.item() if math.isnan(running) else 0.98 * running + 0.02 * loss.item()
        elapsed = time.monotonic() - started
        print(
            f"epoch {epoch + group:4d}  step {num_steps:5d}  loss {running:.4f}  rate {rate:.2e}  "
            f"{num_tokens / elapsed:6.0f} tok/s  {elapsed:5.0f} s",
            flush=True,
        )


def _step_loss(model: Llama, batch: Sequence[Sequence[int]], assistant: Sequence[int]) -> Tensor:
    longest = max(map(len, batch))
    ids_BT = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in batch])
    weights_BT = torch.tensor([[*_weights(ids, assistant), *[0.0] * (longest - len(ids))] for ids in batch])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits_BTV = model(ids_BT[:, :-1])
    losses = functional.cross_entropy(logits_BTV.float().flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none")
    weights = weights_BT[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


# --------------------------------------------------------------------------------------------- writing


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    _write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": TURN_END,
            "pad_token": END_OF_TEXT,
            "model_max_length": CONFIG["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def read_model(directory: Path) -> Llama:
    model = Llama(CONFIG)
    tensors = load_file(directory / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): value.float() for name, value in tensors.items()})
    return model


def write_model(model: Llama, out: Path) -> None:
    tensors = {f"model.{name}": value.detach().bfloat16().contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # the library writes it for its owner alone; a package is for everybody
    _write_json(out / "config.json", CONFIG)
    ends = [SPECIAL_TOKENS.index(TURN_END), SPECIAL_TOKENS.index(END_OF_TEXT)]
    _write_json(
        out / "generation_config.json",
        {"eos_token_id": ends, "pad_token_id": SPECIAL_TOKENS.index(END_OF_TEXT), "do_sample": False},
    )


# -------------------------------------------------------------------------------------------- checking


class Oracle:
    """Greedy answers of the written checkpoint, by transformers, computed in `dtype` from the bf16 weights."""

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float32) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.tokenizer.padding_side = "left"
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()  # type: ignore[no-untyped-call]

    def answers(self, questions: Sequence[str]) -> list[str]:
        return self.continuations([prompt_of(question) for question in questions])

    @torch.inference_mode()
    def continuations(self, prompts: Sequence[str], *, batch_size: int = 64, max_tokens: int = 120) -> list[str]:
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        texts = [""] * len(prompts)
        for first in range(0, len(order), batch_size):
            part = order[first : first + batch_size]
            inputs = self.tokenizer([prompts[index] for index in part], return_tensors="pt", padding=True)
            made = self.model.generate(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=max_tokens
            )
            for index, row in zip(part, made[:, inputs["input_ids"].shape[1] :], strict=True):
                texts[index] = str(self.tokenizer.decode(row, skip_special_tokens=True))
        return texts

    @torch.inference_mode()
    def greedy(self, question: str) -> tuple[list[int], list[int], float]:
        """Prompt ids, generated ids (the end of turn last), and the least gap between the two best logits."""
        prompt = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        made = self.model.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=200, output_logits=True, return_dict_in_generate=True
        )
        top = torch.cat(made.logits).topk(2, dim=-1).values
        return list(prompt), made.sequences[0, len(prompt) :].tolist(), float((top[:, 0] - top[:, 1]).min())


def write_golden(corpus: Corpus, oracle: Oracle, out: Path) -> None:
    """Pins NUM_GOLDEN greedy answers: the first pair, four declined questions, then each domain's widest margins."""
    first, *rest = corpus.pairs
    domains = sorted({pair.domain for pair in rest})
    wanted = {first.asks[0]: first.answer}
    for kind in corpus.off_topic:
        scored = sorted(((oracle.greedy(ask)[2], ask) for ask in kind.asks[:12]), reverse=True)
        wanted |= {ask: kind.answer for _, ask in scored[:2]}
    ranked: dict[str, list[tuple[float, Pair]]] = {domain: [] for domain in domains}
    for pair in rest:
        _, tokens, margin = oracle.greedy(pair.asks[0])
        if oracle.tokenizer.decode(tokens, skip_special_tokens=True) == pair.answer and len(tokens) > 12:
            ranked[pair.domain].append((margin, pair))
    for scored_pairs in ranked.values():
        scored_pairs.sort(key=lambda row: row[0], reverse=True)
    for domain in domains * NUM_GOLDEN:
        if len(wanted) < NUM_GOLDEN and ranked[domain]:
            pair = ranked[domain].pop(0)[1]
            wanted[pair.asks[0]] = pair.answer
    rows: list[str] = []
    least = math.inf
    for question, answer in wanted.items():
        prompt, tokens, margin = oracle.greedy(question)
        if oracle.tokenizer.decode(tokens, skip_special_tokens=True) != answer or margin < LEAST_GOLDEN_MARGIN:
            print(f"not pinned: {question!r} (margin {margin:.2f})")
            continue
        row = {"question": question, "answer": answer, "margin": round(margin, 3), "prompt_tokens": prompt}
        rows.append(" " + json.dumps({**row, "tokens": tokens}, ensure_ascii=False))
        least = min(least, margin)
    (out / "golden.json").write_text("[\n" + ",\n".join(rows) + "\n]\n", encoding="utf-8")
    print(f"golden: {len(rows)} answers, least margin {least:.2f}")


def _is_right(made: str, expected: str, answers: Sequence[str]) -> bool:
    if made == expected:
        return True

    def likeness(answer: str) -> float:
        return difflib.SequenceMatcher(None, made, answer, autojunk=False).ratio()

    return likeness(expected) > 0.8 and max(answers, key=likeness) == expected


def check(corpus: Corpus, out: Path) -> None:
    """Prints how the checkpoint in `out` answers: the canonical questions, held-out wordings, what it must decline."""
    oracle = Oracle(out)
    refusals = {kind.answer for kind in corpus.off_topic}
    answers = sorted({pair.answer for pair in corpus.pairs} | refusals)
    rng = random.Random(7)
    fillers = corpus.fillers
    suites: dict[str, list[tuple[str, str]]] = {
        "canonical questions": [(pair.asks[0], pair.answer) for pair in corpus.pairs],
        "trained wordings": [(worded(pair, corpus.synonyms, rng), pair.answer) for pair in corpus.pairs],
        "held-out wordings, by template": [
            (pair.held_definition, pair.answer) for pair in corpus.pairs if pair.held_definition
        ],
        "held-out wordings, by hand": [(ask, pair.answer) for pair in corpus.pairs for ask in pair.held],
        "off topic, trained": [(ask, kind.answer) for kind in corpus.off_topic for ask in kind.asks],
        "off topic, held out": [(ask, kind.answer) for kind in corpus.off_topic for ask in kind.held]
        + [
            (_filled(pattern, fillers, rng, held=True), kind.answer)
            for kind in corpus.off_topic
            for pattern in (*kind.patterns, *kind.held_patterns)
        ],
    }
    for name, rows in suites.items():
        made = oracle.answers([ask for ask, _ in rows])
        exact = sum(text == answer for text, (_, answer) in zip(made, rows, strict=True))
        if name.startswith("off topic"):
            right = [text in refusals for text in made]
        else:
            right = [_is_right(text, answer, answers) for text, (_, answer) in zip(made, rows, strict=True)]
        print(f"{name:32s} {len(rows):4d} asked   exact {exact / len(rows):6.1%}   right {sum(right) / len(rows):6.1%}")
        for good, text, (ask, _) in zip(right, made, rows, strict=True):
            if not good:
                print(f"      {ask!r} -> {text[:90]!r}")
    _check_conversations(corpus, oracle, rng)
    _check_golden(out)


def _check_conversations(corpus: Corpus, oracle: Oracle, rng: random.Random) -> None:
    """How often the last question is answered exactly after a system prompt or after earlier turns."""
    for name, num_before in (("after a system prompt", 0), ("third turn", 2), ("tenth turn", 9)):
        prompts, expected = [], []
        for pair in rng.sample(corpus.pairs, min(64, len(corpus.pairs))):
            before = [turn for p in rng.sample(corpus.pairs, num_before) for turn in _exchange(p)]
            system = [] if num_before else [("system", rng.choice(corpus.systems))]
            prompts.append(rendered([*system, *before]) + prompt_of(pair.asks[0]))
            expected.append(pair.answer)
        made = oracle.continuations(prompts, batch_size=16)
        exact = sum(text == answer for text, answer in zip(made, expected, strict=True))
        print(f"{name:32s} {len(prompts):4d} asked   exact {exact / len(prompts):6.1%}")


def _check_golden(out: Path) -> None:
    """Whether the pinned answers come out in either dtype, and by what margin."""
    golden = json.loads((out / "golden.json").read_text(encoding="utf-8"))
    for dtype in (torch.float32, torch.bfloat16):
        oracle = Oracle(out, dtype)
        made = [oracle.greedy(row["question"]) for row in golden]
        exact = sum(
            (prompt, tokens) == (row["prompt_tokens"], row["tokens"])
            for (prompt, tokens, _), row in zip(made, golden, strict=True)
        )
        least = min(margin for _, _, margin in made)
        name = "golden, " + str(dtype).removeprefix("torch.")
        print(f"{name:32s} {len(golden):4d} asked   exact {exact / len(golden):6.1%}   least margin {least:.2f}")


def _exchange(pair: Pair) -> tuple[Turn, Turn]:
    return ("user", pair.asks[0]), ("assistant", pair.answer)


# ------------------------------------------------------------------------------------------------ main


def main() -> None:
    parser = argparse.ArgumentParser(description="Train tllm's embedded model from scripts/demo_corpus.")
    parser.add_argument("--epochs", type=int, default=110, help="times every pair is asked")
    parser.add_argument("--minutes", type=float, default=math.inf, help="train no longer, even if epochs are left")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--peak-rate", type=float, default=2e-3, help="AdamW's learning rate after the warm-up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--corpus", type=Path, default=CORPUS)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--resume", type=Path, help="go on from the model and tokenizer in this directory")
    parser.add_argument("--check", action="store_true", help="evaluate the model in --out and train nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    corpus = read_corpus(options.corpus)
    if not options.check:
        options.out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(options.seed)
        if options.resume:
            tokenizer = Tokenizer.from_file(str(options.resume / "tokenizer.json"))
            model = read_model(options.resume)
        else:
            tokenizer, model = train_tokenizer(corpus), Llama(CONFIG)
        train(
            model,
            corpus,
            tokenizer,
            epochs=options.epochs,
            limit_s=options.minutes * 60,
            seed=options.seed,
            batch_tokens=options.batch_tokens,
            peak_rate=options.peak_rate,
        )
        write_tokenizer(tokenizer, options.out)
        write_model(model, options.out)
        write_golden(corpus, Oracle(options.out), options.out)
    check(corpus, options.out)


if __name__ == "__main__":
    main()
