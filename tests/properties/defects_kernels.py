"""Deliberate defects in kernels and components: attention, streams, and the memory. See defects.py."""

from __future__ import annotations

from tests.properties.mutations import defect

ATTENTION = (
    defect(
        "causal mask off by one",
        "a token of a segment sees the next one",
        ("kernels.attention:segment_attention", "place <= place[:, None])", "place <= place[:, None] + 1)"),
    ),
    defect(
        "window one too long for long calls",
        "the whole-sequence program sees a token more than the one-token program",
        ("kernels.attention:_window_blocks", "distance < window", "distance <= window"),
    ),
    defect(
        "window one too long everywhere",
        "both programs see a token more than the spec says",
        ("components.attention:WindowAttention.__init__", "site.parameters.window", "site.parameters.window + 1"),
    ),
    defect(
        "rotary positions counted from the call",
        "keys in the cache and queries of a later call are turned against each other",
        ("components.attention:Attention.place", "return clock.position", "return clock.position - clock.position[:, :1]"),
    ),
    defect(
        "rotary turn with a wrong sign",
        "pairs of features are mirrored, not turned",
        ("kernels.rotary:rotate", "second * cos + first * sin", "second * cos - first * sin"),
    ),
    defect(
        "full attention forgets its newest token",
        "the last token of a call is missing from the cache",
        ("kernels.attention:_full_index", "(slot <= tail)", "(slot < tail)"),
    ),
    defect(
        "grown cache filled in front",
        "a cache that grows moves its tokens to later positions",
        (
            "runtime.model:_grow",
            "[cache, cache.new_zeros(cache.shape[0], room - cache.shape[1], *cache.shape[2:])]",
            "[cache.new_zeros(cache.shape[0], room - cache.shape[1], *cache.shape[2:]), cache]",
        ),
    ),
    defect(
        "segment cache of the wrong segment",
        "a call that ends in a later segment leaves its first one in the cache",
        ("kernels.attention:segment_attention", "(clock.end - 1).clamp(min=0) // segment", "clock.lead // segment"),
    ),
    defect(
        "persistent tokens forgotten",
        "attention sees no fixed elements",
        ("kernels.attention:attend", "if fixed is not None:", "if False:"),
    ),
    defect(
        "attention across a document seam",
        "a token of full attention sees the document before its own",
        ("kernels.attention:full_visible", "(distance > 0) & (distance <= place)", "(distance > 0) & (distance <= query)"),
    ),
)

STREAMS = (
    defect(
        "convolution tail late by one",
        "a later call sees each input one token too far back",
        ("kernels.convolution:_plain", "last(joined, end, kernel - 1)", "last(joined, (end - 1).clamp(min=0), kernel - 1)"),
    ),
    defect(
        "convolution across a document seam",
        "the first tokens of a document see the end of the one before",
        ("kernels.convolution:_plain", "(position >= j)", "(position >= 0)"),
    ),
    defect(
        "convolution taps reversed",
        "the tap of this token is taken for that of the oldest",
        (
            "kernels.convolution:_plain",
            "joined[:, start : start + slots] * taps[j]",
            "joined[:, start : start + slots] * taps[kernel - j]",
        ),
    ),
    defect(
        "state of one row leaks to another",
        "rows look back on each other's tails",
        ("kernels.timeline:extend", "torch.cat([tail, x], dim=1)", "torch.cat([tail.flip(0), x], dim=1)"),
    ),
    defect(
        "branches of a gate exchanged",
        "the sigmoid gate favours the wrong branch",
        ("components.gate_sigmoid:SigmoidGate.forward", "b + g * (a - b)", "a + g * (b - a)"),
    ),
    defect(
        "sign of a gate",
        "the second branch of the residual gate is taken away",
        (
            "components.gate_residual:ResidualGate.forward",
            "torch.addcmul(a, self.vector, b)",
            "torch.addcmul(a, self.vector, -b)",
        ),
    ),
    defect(
        "one branch of a gate not normalised",
        "the product gate takes its second branch as it is",
        ("components.gate_product:ProductGate.forward", "self.branch(b, self.gain_b)", "self.nonlinearity(b)"),
    ),
    defect(
        "slice of the wrong piece",
        "a slice gives the piece before the one that is asked for",
        ("components.sequence_slice:Slice.index", "names.index(keep)", "max(0, names.index(keep) - 1)"),
    ),
    defect(
        "gate of the SwiGLU exchanged",
        "the nonlinearity is on the wrong half",
        ("components.mlp_swiglu:SwiGLU.map", "gate, up = ", "up, gate = "),
    ),
)

MEMORY = (
    defect(
        "anchor late for single tokens in training",
        "where gradients are recorded, a single token that begins a chunk takes its gradient at the weights of the one before",
        ("kernels.memory:memory_step", "(place % chunk == 0)", "(place % chunk == 1 % chunk)"),
    ),
    defect(
        "anchor late for single tokens",
        "decoding goes on with the anchor of the chunk before",
        ("kernels.memory_lazy:_anchored", "anchor = [w.clone() for w in state.weights]", "anchor = state.anchor"),
        ("kernels.memory_lazy:_anchored", "old.index_copy(0, index, new.to(old.dtype)) for", "old for"),
    ),
    defect(
        "past surprise of the ring does not fade",
        "decoding keeps the momentum of the last tokens as it was",
        ("kernels.memory_lazy:_portable", "torch.where(here, theta, eta * s)", "torch.where(here, theta, s)"),
    ),
    defect(
        "ring written without its newest token",
        "weights that decoding writes out lack one update",
        ("kernels.memory_lazy:_subtract", "(share[..., None] * u)", "(share[..., None] * u)[..., :-1, :]"),
        ("kernels.memory_lazy:_subtract", "d.flatten(0, 1), alpha=-1", "d[..., :-1, :].flatten(0, 1), alpha=-1"),
    ),
    defect(
        "anchor late by one chunk",
        "a state between calls holds the weights at which the chunk before took its gradients",
        (
            "kernels.memory_forward:Forward.chunk",
            "at = self.weights if flags.all_first else where(flags.first, self.weights, self.anchor)",
            "at = self.weights if c + 1 < self.steps else self.anchor",
        ),
    ),
    defect(
        "anchor of another row's chunk",
        "beside a row that resumes a chunk, rows that begin one take gradients at an old anchor",
        ("kernels.memory_walk:Walk.inputs", "*where(self.flags[c].first, weights, self.entry_anchor)", "*self.entry_anchor"),
    ),
    defect(
        "gradients at the current weights",
        "the recurrence follows every token, not the chunk's first weights",
        ("kernels.memory_reference:memory_reference", "at = where_rows(first, before, state.anchor)", "at = before"),
    ),
    defect(
        "momentum not carried across a split",
        "a state holds no surprise of the past",
        (
            "kernels.memory_state:named",
            "(anchor, weights, momenta), strict=True)",
            "(anchor, weights, [torch.zeros_like(m) for m in momenta]), strict=True)",
        ),
    ),
    defect(
        "forgetting applied after the write, for single tokens",
        "M = keep (M + S) for single tokens",
        ("kernels.memory_lazy:_portable", "keep * w + s, keep * a0", "keep * (w + s), keep * a0"),
    ),
    defect(
        "forgetting applied after the write, everywhere",
        "M = keep (M + S) in every program, which all agree",
        ("kernels.memory:memory_step", "_rows(keep, m) * m + s", "_rows(keep, m) * (m + s)"),
        ("kernels.memory_reference:memory_reference", "_rows(keep, m) * m + s", "_rows(keep, m) * (m + s)"),
        ("kernels.memory_chunk:mixing", "torch.bmm(keep[..., 1:],", "torch.bmm(keep[..., :-1].tril(),"),
        (
            "kernels.memory_lazy:_portable",
            "keep * w + s, keep * a0, keep * f + e0",
            "keep * (w + s), keep * a0, keep * (f + e0)",
        ),
    ),
    defect(
        "read before taken for after, in long calls",
        "the whole-sequence program answers with the token's own write",
        ("kernels.memory_chunk:mixing", 'if read == "before":', "if False:"),
    ),
    defect(
        "read before taken for after, everywhere",
        "all programs answer with the token's own write",
        ("kernels.memory_chunk:mixing", 'if read == "before":', "if False:"),
        ("kernels.memory:memory_step", '"before": before,', '"before": after,'),
        ("kernels.memory_lazy:_portable", "else new.before(_all_to(dtype, (w, a0, f)))", "else new"),
        ("kernels.memory_reference:memory_reference", '"before": before,', '"before": after,'),
    ),
    defect(
        "step cap from later keys",
        "the step of a token shrinks by keys that come after it",
        ("kernels.memory_crowding:_sums", ".abs_().tril()", ".abs()"),
    ),
    defect(
        "step cap from keys of the chunk before",
        "single tokens count what is left in the ring",
        ("kernels.memory_crowding:_one", "<= slot", ">= 0 * slot"),
    ),
    defect(
        "step cap without momentum",
        "the step is as large as without momentum, which then adds up ten of them",
        ("kernels.memory_crowding:step_cap", "(1.0 - max_momentum) / (3.0", "1.0 / (3.0"),
    ),
    defect(
        "step not bounded by the weights, for single tokens",
        "decoding leaves out the bound of the chunk's first weights",
        ("kernels.memory_lazy:_portable", "if bounded:", "if False:"),
    ),
    defect(
        "gradient through the step's bound",
        "training may trade accuracy for a larger step, in the recurrence alone",
        ("kernels.memory_bound:weight_norms", "weights[name].detach()", "weights[name]"),
    ),
    defect(
        "initial weights not restored at a seam",
        "a document in the middle of a call starts with what the one before has learned",
        ("kernels.memory_walk:flags_of", "(position[:, ::chunk] == 0)", "(position[:, ::chunk] < 0)"),
    ),
    defect(
        "initial momenta not restored at a seam",
        "a document that starts with a single token starts with the momentum of the one before",
        (
            "kernels.memory_lazy:_restarted",
            "[torch.zeros_like(x) for x in state.momenta]",
            "state.momenta",
        ),
    ),
    defect(
        "opening reads the current weights",
        "what is recalled before a segment knows what the segment wrote",
        (
            "kernels.memory_state:opening_weights",
            'torch.where(begins.view(shape), now, state[f"opening.{name}"])',
            "now",
        ),
    ),
    defect(
        "queries not normalised",
        "the memory is asked with queries of any length",
        (
            "components.memory_neural:NeuralMemory._convolved",
            'unit = self.p.heads, name != "value"',
            'unit = self.p.heads, name == "key"',
        ),
    ),
    defect(
        "objective half",
        "surprise is half of what the equation says",
        ("kernels.memory_objectives:_l2", ".square()", ".square() / 2"),
    ),
    defect(
        "second-order term dropped",
        "gradients do not pass through the memory's own gradients",
        (
            "kernels.memory_chunk:trace_keys",
            "(deltas,) = pull(torch.ones_like(loss))",
            "(deltas,) = torch.utils._pytree.tree_map(torch.Tensor.detach, pull(torch.ones_like(loss)))",
        ),
    ),
    defect(
        "initial weights get no gradient at a seam",
        "documents after the first do not train where memories start",
        (
            "kernels.memory_reverse:Reverse.run",
            "self._to_initial(self.walk.flags[c + 1])",
            "_ = c < 0 and self._to_initial(self.walk.flags[c + 1])",
        ),
    ),
    defect(
        "checkpoint of the wrong chunk",
        "backward runs a chunk from the state that the one before it started from",
        ("kernels.memory_reverse:Reverse.start", "range(base, c)", "range(base, max(base, c - 1))"),
    ),
    defect(
        "phase of the memory function off by one",
        "a call that goes on inside a chunk stands one token too far",
        ("kernels.memory_function:neural_memory", "phase = (lead + tokens) % chunk", "phase = (lead + tokens + 1) % chunk"),
    ),
)
