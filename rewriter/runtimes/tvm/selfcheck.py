"""Does TVM compile, run and serialise here? Called in a worker, because a wrong ffi release ends the process."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax


def selfcheck() -> str:
    """Compile and run a tiny module and serialise it; returns one line. A crash is seen by the caller as such."""
    x = relax.Var("x", relax.TensorType((4, 4), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit_output(relax.op.add(x, x))
        builder.emit_func_output(y)
    module = builder.get()
    # apache-tvm-ffi after 0.1.14 crashes here, and with it every tuning database.
    serialised = tvm.ir.save_json(module)
    vm = relax.VirtualMachine(tvm.compile(module, target=tvm.target.Target({"kind": "llvm"})), tvm.cpu())
    result = vm["main"](tvm.runtime.tensor(np.ones((4, 4), "float32")))
    if not np.array_equal(result.numpy(), np.full((4, 4), 2.0)):
        raise RuntimeError("a compiled addition gives a wrong result")
    return f"TVM {tvm.__version__} compiles, runs and serialises ({len(serialised):,} characters)"
