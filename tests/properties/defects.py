"""The deliberate defects: mistakes that somebody could make anywhere in the product, each of which some law must catch."""

from __future__ import annotations

from tests.properties.defects_kernels import ATTENTION, MEMORY, STREAMS
from tests.properties.mutations import defect

PASSES = (
    defect(
        "a pass drops an edge",
        "the last of three or more values of an input is lost",
        (
            "passes.expand:_Scope._leaf",
            "pairs = [(found, ref.text()) for ref in refs if (found := self.resolve(ref)) is not None]",
            "pairs = [(found, ref.text()) for ref in refs[:2] if (found := self.resolve(ref)) is not None]",
        ),
    ),
    defect(
        "copies of a repeated block share their weights",
        "every copy gets the component of the first",
        (
            "lowering.lowered:build_modules",
            "level.add_module(last, _component(c, name))",
            "level.add_module(last, made.setdefault(re.sub(r'[.][0-9]+[.]', '.', name), _component(c, name)))",
        ),
        ("lowering.lowered:build_modules", "root = Holder()", "root, made = Holder(), {}"),
    ),
    defect(
        "repeated block fed from its own input",
        "the second copy reads what the first one read",
        ("passes.expand:_Scope._inner", "if copy and first is not None:", "if copy > 1 and first is not None:"),
    ),
    defect(
        "loop of half a segment",
        "the memory opens twice in every segment of a long call",
        (
            "passes.find_feedback:_period",
            "return (None if wrong else period), wrong",
            "return (None if wrong else period // 2), wrong",
        ),
    ),
    defect(
        "feedback forgotten between segments",
        "every segment of a loop starts from the state before the call",
        ("runtime.runner:Driver._loop", "outputs, nodes = self._call(", "outputs, last = self._call("),
    ),
    defect(
        "feedback ordered wrongly",
        "the scheduler lets a memory write before it opens",
        (
            "components.memory_neural:NeuralMemory.stages",
            'Stage("open", ("opening",), ("recalled",))',
            'Stage("open", ("opening", "write"), ("recalled",))',
        ),
    ),
    defect(
        "sharing looks at calls alone",
        "two regions that differ in their wiring get one function",
        ("lowering.lowered:_signature", "parts.append((local, step.stage, wiring,", "parts.append((local, step.stage,"),
        ("lowering.lowered:_signature", "site.parameters, types,", "site.parameters,"),
    ),
    defect(
        "a pass toggles what it should set",
        "sharing that runs twice is off again",
        ("passes.choose_kernels:Share.run", "share=True", "share=not c.share"),
    ),
    defect(
        "the causality pass accepts a leak",
        "a graph whose tokens read all of their segment is compiled",
        ("shapes:Dependence.leaks", 'in ("segment", "everything")', 'in ("everything",)'),
    ),
    defect(
        "a loop without delay is accepted",
        "cycles of calls are not looked for",
        (
            "passes.find_feedback:_cycles",
            "in nx.strongly_connected_components(net)",
            "in list(nx.strongly_connected_components(net))[:0]",
        ),
    ),
    defect(
        "shape inference off by one",
        "persistent tokens are counted one too many",
        (
            "components.tokens_persistent:PersistentTokens.infer",
            "fixed(site.parameters.count,",
            "fixed(site.parameters.count + 1,",
        ),
    ),
    defect(
        "a form loses the segment",
        "a graph written as YAML comes back without segments",
        ("spec.write:_block", "if block.segment is not None:", "if False:"),
    ),
    defect(
        "a form loses repetitions",
        "a graph written as text comes back with every node once",
        ("ir.text:_node", "if node.repeat != 1:", "if False:"),
    ),
)

STATE = (
    defect(
        "phase forgotten",
        "a row that goes on inside a chunk is laid on the grid as if it began one",
        ("runtime.layout:_runs", "base % period, base", "0 * base, base"),
    ),
    defect(
        "seam between calls missed",
        "a document that starts with a call goes on with the one before",
        ("runtime.layout:_seams", "seams[:, 0] &= position > 0", "seams[:, 0] = False"),
    ),
    defect(
        "seam inside a call missed",
        "documents packed into one call are one document",
        ("runtime.layout:_runs", "marks[:, 0] = False", "marks[:] = False"),
    ),
    defect(
        "single tokens do not see their document",
        "a call of one token goes on with the document before",
        ("runtime.layout:token_layout", "if ids is not None:", "if False:"),
    ),
    defect(
        "lead of later segments",
        "every piece of a loop believes that earlier calls filled its first slots",
        ("runtime.layout:pieces", "(clock.lead - offsets).clamp(0, size)", "(clock.lead - 0 * offsets).clamp(0, size)"),
    ),
    defect(
        "reset leaves the position",
        "a row that starts afresh still stands where it stood",
        ("runtime.state:State.reset", "torch.where(mask, 0, self.position)", "self.position"),
    ),
    defect(
        "reset of every row",
        "resetting one row resets the others too",
        ("runtime.state:State.reset", "mask[index] = True", "mask[:] = True"),
    ),
    defect(
        "reorder ignores repeated rows",
        "a row that is asked for twice comes once",
        ("runtime.state:State._rows", "index = _indices(rows, self.batch)", "index = _indices(rows, self.batch).unique()"),
    ),
    defect(
        "reorder leaves the positions",
        "tensors of the nodes are reordered, the rows' places are not",
        (
            "runtime.state:State.map",
            "State(change(self.position), change(self.document)",
            "State(self.position, self.document",
        ),
    ),
    defect(
        "a saved state lacks a tensor",
        "the last tensor of the state is not written",
        ("runtime.state:State.save", "self._tensors().items()}", "list(self._tensors().items())[:-1]}"),
    ),
    defect(
        "a saved state is rounded",
        "a file holds single precision",
        (
            "runtime.state:State.save",
            ".contiguous().clone()",
            ".contiguous().clone().to(t.dtype if t.dtype == torch.int64 else torch.float32).to(t.dtype)",
        ),
    ),
    defect(
        "detach keeps the history",
        "backpropagation is not truncated",
        ("runtime.state:State.detach", "self.map(torch.Tensor.detach)", "self.map(torch.Tensor.clone)"),
    ),
    defect(
        "a call writes into its state",
        "the state before a call is changed by it",
        (
            "runtime.model:Model.forward",
            "State(layout.position, layout.document, held,",
            "State(state.position.copy_(layout.position), layout.document, held,",
        ),
    ),
    defect(
        "states of other specs accepted",
        "a state goes into any model whose nodes have the same names",
        ("runtime.model:Model._check_state", "state.fingerprint != self.fingerprint", "False"),
    ),
    defect(
        "rows of a memory's state not reordered",
        "the anchor stays with its row number when rows move",
        (
            "kernels.memory_function:MemoryState.reorder",
            "return self._map(lambda x: x.index_select(0, rows))",
            "return self._map(lambda x: x[: len(rows)])",
        ),
    ),
)

TRAINING = (
    defect(
        "optimizer not restored",
        "a run that goes on has forgotten its moments",
        ("training.checkpoint:restore", "if name in moments:", "if False:"),
    ),
    defect(
        "step not restored",
        "a run that goes on reads the windows of the first steps again",
        (
            "training.loop:_Run._resume",
            "self.step = self.saved = found.step",
            "self.step, self.saved = found.step - 1, found.step",
        ),
    ),
    defect(
        "evaluation forgets its state",
        "every piece of a long stream is read afresh",
        ("training.evaluate:bits_per_byte", "state if carried else None", "None"),
    ),
)

ALL = (*ATTENTION, *STREAMS, *MEMORY, *PASSES, *STATE, *TRAINING)
