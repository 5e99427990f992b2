"""python -m ptxcheck FILE...: list kernels and instructions that cannot run.

FILE is PTX text or a .cu source (compiled with nvcc for sm_86)."""

import sys

from . import load, nvcc_ptx


def main(paths):
    if not paths:
        print(__doc__)
        return 2
    status = 0
    for path in paths:
        if path.endswith(".cu"):
            text = nvcc_ptx(path)
        else:
            with open(path) as f:
                text = f.read()
        mod = load(text)
        bad = mod.unsupported()
        for name, params in mod.kernels.items():
            args = ", ".join(t if n <= 8 else f"{n} bytes" for _, t, n in params)
            k = mod._kernels.get(name)
            size = f", {len(k.code)} instructions, {k.static_size} B static shared" if k else ""
            print(f"{path}: {name}({args}){size}")
            for msg in bad[name]:
                status = 1
                print(f"    unsupported: {msg}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
