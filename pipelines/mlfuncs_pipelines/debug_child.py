"""Run one step's request in the foreground: `python -P debug_child.py REQUEST`. Only the standard library is needed."""

import json
import os
import pdb  # noqa: T100 - this program is the way into the debugger
import runpy
import sys
import traceback


def main():
    """Run the step; open the debugger where it failed, when there is a terminal."""
    with open(sys.argv[1], encoding="utf-8") as file:
        request = json.load(file)
    sys.path[:0] = request.get("path") or []
    handlers = runpy.run_path(os.path.join(os.path.dirname(os.path.abspath(__file__)), "step_child.py"))["HANDLERS"]
    os.chdir(request["cwd"])
    try:
        code, output = handlers[request["kind"]](request, None)
    except Exception:  # noqa: BLE001 - the step may raise anything, and that is what is being looked for
        traceback.print_exc()
        if sys.stdin.isatty():
            pdb.post_mortem()
        return 1
    print("the step succeeded", *([] if output is None else [json.dumps(output)]))
    return code


if __name__ == "__main__":
    sys.exit(main())
