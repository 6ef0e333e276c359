"""A CUDA GPU that is not there: Inductor generates kernels for it, Triton compiles them, Triton's interpreter runs them.

For tests and benchmarks, never for the package. What patches torch does so for good, in a process of its own (``worker``).

    device.py      torch and Inductor believe in a GPU of a given compute capability
    cases.py       what is compiled or run: masks, types, head dims, options
    generate.py    Inductor's sources for a case
    assemble.py    registers, spills, shared memory and loops of the machine code of a source
    interpret.py   the generated code run on real values, forward and backward
    host.py        whole models: real on the CPU, fake on the GPU; what the host waits for, and memory
    launch.py      generated wrappers run on fakes, whose kernels do nothing
    published.py   published models and calls as their pipelines make them
    study.py       the process of one model's calls
    worker.py      the process that does it, and how to start one: cases in, results out
"""
