"""What GPT-2's forward and backward pass keep in memory, moment by moment, without building a model.

The tensors that autograd saves follow from the operations of ``transformers``' GPT-2 as ``model/gpt2.py`` sets it up:
fused causal attention, one activation function, the loss over fp32 logits. Sizes are for one row of a micro-batch, so
that a plan over many micro-batches multiplies only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass

from codeparrot_ds.model.shapes import GPT2Shape, chunk_of_tokens, num_parameters

FP32 = 4
STATISTICS = 2  # LayerNorm saves mean and reciprocal standard deviation
INDEX = 8  # bytes of a token id
# Functions whose backward needs their output only: the next matrix product saves that already. The others save their
# input too.
OUTPUT_ONLY_ACTIVATIONS = ("relu", "tanh", "sigmoid")


@dataclass(frozen=True)
class Parameter:
    """One weight of the model: its name, its number of elements, and whether it is in the group with weight decay."""

    name: str
    numel: int
    decayed: bool


@dataclass(frozen=True, kw_only=True)
class Moment:
    """One point of a backward pass: what lies in memory beside the model's state and its finished gradients.

    ``*_a_row`` is bytes for each row of the micro-batch. ``arriving`` are the parameters whose gradients are complete
    at this moment; ``unfinished_gradient`` is the tied embedding's part from the head, which waits for the rest.
    ``needed`` is how many parameters the backward pass uses from here on (stage 3 gathers those).
    """

    name: str
    activations_a_row: int
    logits_a_row: int = 0
    temporary_a_row: int = 0
    temporary: int = 0
    arriving: tuple[Parameter, ...] = ()
    unfinished_gradient: int = 0
    needed: int = 0


def parameters(shape: GPT2Shape) -> list[Parameter]:
    """Every parameter in the order of ``GPT2LMHeadModel.parameters()``; the sum is ``num_parameters(shape)``."""
    width, inner = shape.n_embd, shape.n_inner or 4 * shape.n_embd

    def norm(name: str) -> Iterator[Parameter]:
        yield Parameter(f"{name}.weight", width, False)
        yield Parameter(f"{name}.bias", width, False)

    def product(name: str, rows: int, columns: int) -> Iterator[Parameter]:
        yield Parameter(f"{name}.weight", rows * columns, True)
        yield Parameter(f"{name}.bias", columns, False)

    found = [Parameter("wte", shape.vocab_size * width, True), Parameter("wpe", shape.n_positions * width, True)]
    for layer in range(shape.n_layer):
        found += norm(f"h.{layer}.ln_1")
        found += product(f"h.{layer}.attn.c_attn", width, 3 * width)
        found += product(f"h.{layer}.attn.c_proj", width, width)
        found += norm(f"h.{layer}.ln_2")
        found += product(f"h.{layer}.mlp.c_fc", width, inner)
        found += product(f"h.{layer}.mlp.c_proj", inner, width)
    found += norm("ln_f")
    if not shape.tie_word_embeddings:
        found.append(Parameter("lm_head", shape.vocab_size * width, True))
    return found


@dataclass
class BackwardPass:
    """The moments of one backward pass of GPT-2, from the loss to the embeddings."""

    shape: GPT2Shape
    _: KW_ONLY
    seq_length: int
    width: int
    """Bytes of a weight and of an activation: 2 for bf16 and fp16, 4 for fp32."""
    attention: str
    """``flash`` or ``math`` (whole scores)."""
    dropout: bool
    """One byte per masked element, as CUDA's ``native_dropout`` saves it."""
    checkpointing: bool
    """Whether each block keeps its input only and is computed again in the backward pass."""
    chunked_loss: bool = False
    """Whether the fp32 softmax is there for some tokens at a time (``model/gpt2.py``)."""
    fused_loss: bool = False
    """Whether the gradient takes the logits' place, unless the loss is chunked (``model/fused_loss.py``)."""
    checkpoints_on_host: bool = False
    """Whether the blocks' inputs wait in host memory."""

    def __post_init__(self) -> None:
        shape, tokens = self.shape, self.seq_length
        self.hidden = self.width * tokens * shape.n_embd  # bytes of one row of the residual stream
        self.inner = self.width * tokens * (shape.n_inner or 4 * shape.n_embd)
        self.norm = self.hidden + STATISTICS * FP32 * tokens
        self.mask = tokens * shape.n_embd if self.dropout else 0
        self.scores = tokens * tokens * shape.n_head
        self.table = self.width * shape.vocab_size * shape.n_embd if shape.tie_word_embeddings else 0
        self.by_name = {parameter.name: parameter for parameter in parameters(shape)}
        self.block_numel = sum(p.numel for name, p in self.by_name.items() if name.startswith("h.0."))

    @property
    def block(self) -> int:
        """Bytes a row that one block saves: 16 times the residual stream with GELU, and the attention's own."""
        residuals = 2 * self.hidden + 2 * self.mask  # what each of the two additions makes; the two dropout masks
        return 2 * self.norm + self.saved_attention + self.saved_activations * self.inner + residuals

    @property
    def saved_activations(self) -> int:
        """How many tensors of the MLP's inner width the activation function and the product behind it save."""
        return 1 if self.shape.activation_function in OUTPUT_ONLY_ACTIVATIONS else 2

    @property
    def saved_attention(self) -> int:
        """Bytes a row of queries, keys, values, the output, and what the kernel adds.

        Flash keeps the log-sum-exp in fp32. Plain attention (``_scaled_dot_product_attention_math``) keeps its
        probabilities, and computes in fp32: of 16-bit queries, keys and values it keeps fp32 copies instead.
        """
        if self.attention == "flash":
            return 4 * self.hidden + FP32 * self.shape.n_head * self.seq_length
        kept = 4 * self.hidden if self.width == FP32 else 7 * self.hidden
        return kept + FP32 * self.scores + (self.scores if self.dropout else 0)

    @property
    def logits(self) -> int:
        """Bytes a row of the loss's backward pass: log-probabilities and two gradients of their size, all fp32.

        A chunked loss has the logits and their gradient, in the precision of the weights, a fused one the logits alone.
        """
        widths = 2 * self.width if self.chunked_loss else self.width if self.fused_loss else 3 * FP32
        return widths * self.seq_length * self.shape.vocab_size

    @property
    def softmax_chunk(self) -> int:
        """Bytes of a chunked loss's chunk of logits in fp32, where they are not, and of its softmax."""
        vocab_size = self.shape.vocab_size
        tensors = 1 if self.width == FP32 else 2
        return tensors * FP32 * chunk_of_tokens(self.seq_length, vocab_size) * vocab_size if self.chunked_loss else 0

    def kept(self, blocks: int) -> int:
        """Bytes a row that the embeddings and the first ``blocks`` blocks keep for the backward pass."""
        inputs = self.hidden + self.mask + 3 * INDEX * self.seq_length
        if self.checkpoints_on_host:
            return inputs + min(blocks, 2) * self.hidden  # the newest stays; the one before is on its way
        return inputs + blocks * (self.hidden if self.checkpointing else self.block)

    def moments(self) -> list[Moment]:
        """The moments in order; autograd frees what a node saved when the node is done."""
        found = list(self._head())
        for layer in reversed(range(self.shape.n_layer)):
            found += self._block_moments(layer)
        found += self._embeddings()
        return found

    def _head(self) -> Iterator[Moment]:
        needed, kept = num_parameters(self.shape), self.kept(self.shape.n_layer)
        yield Moment(
            name="loss",
            activations_a_row=kept + self.norm,
            logits_a_row=self.logits,
            temporary=self.softmax_chunk,
            needed=needed,
        )
        row_logits = self.width * self.seq_length * self.shape.vocab_size
        yield self._moment("lm_head", kept + self.norm, self.hidden, needed, logits_a_row=row_logits)
        yield self._moment("ln_f", kept, 2 * self.hidden, needed)

    def _block_moments(self, layer: int) -> Iterator[Moment]:
        """One block backwards. A product's backward pass makes the gradient of its input, then that of its weight."""
        hidden, inner = self.hidden, self.inner
        below = self.kept(layer)
        # Without checkpointing the block's own output is gone: the norm behind it has been through its backward pass.
        saved = self.block if self.checkpointing else self.block - hidden
        attention = self.saved_attention
        unactivated = saved - self.saved_activations * inner
        score_gradients = 0 if self.attention == "flash" else 2 * FP32 * self.scores
        steps = [
            ("mlp.c_proj", saved, hidden + inner),
            ("mlp.activation", unactivated + inner, hidden + 2 * inner),
            ("mlp.c_fc", unactivated, 2 * hidden + inner),
            ("ln_2", unactivated - hidden, 3 * hidden),
            ("attn.c_proj", self.norm + attention, 3 * hidden),
            ("attn.scores", self.norm + attention, 8 * hidden + score_gradients),
            ("attn.c_attn", self.norm, 5 * hidden),
            ("ln_1", self.norm, 3 * hidden),
        ]
        needed = self._embedding_numel + (layer + 1) * self.block_numel
        for part, own, temporary in steps:
            yield self._moment(f"h.{layer}.{part}", below + own, temporary, needed)

    def _embeddings(self) -> Iterator[Moment]:
        kept, needed = self.kept(0), self._embedding_numel
        yield self._moment("wpe", kept, 2 * self.hidden, needed)
        # The embedding's own gradient beside the head's, and their sum.
        yield self._moment("wte", kept, self.hidden, needed, temporary=self.table)

    @property
    def _embedding_numel(self) -> int:
        return self.by_name["wte"].numel + self.by_name["wpe"].numel

    def _moment(self, module: str, activations: int, temporary_a_row: int, needed: int, **more: int) -> Moment:
        """The end of a module's backward pass: its own gradients are complete, the tied embedding's is not."""
        names = (module, f"{module}.weight", f"{module}.bias")
        return Moment(
            name=module,
            activations_a_row=activations,
            temporary_a_row=temporary_a_row,
            arriving=tuple(self.by_name[name] for name in names if name in self.by_name),
            unfinished_gradient=self.table,
            needed=needed,
            **more,
        )
