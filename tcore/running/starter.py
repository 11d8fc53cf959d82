"""Steps start as forks of one process that has torch and pandas loaded already: each saves its two seconds.

The server (`serve`) loads the libraries once per run, nothing of this project, and never computes. For every
step it forks a minder and the minder the step, which is then what `python scripts/<step>.py ...` would be:
the same arguments, folder, environment, streams and number of threads. The client (`main`, run as a file
and without site-packages, so within milliseconds) stands in for it: it ends with the step's exit code, and if
it is killed the minder kills the step. Where no server answers the client becomes plain Python: on another
host, say.
"""

import os
import socket
import sys

ADDRESS = "TCORE_STARTER"  # environment variable: name of the server's socket, which is no file
LOADED = (
    "torch._dynamo",  # torch's optimisers load it at their first step
    "pandas",
    "pyarrow.dataset",
    "safetensors.torch",
    "scipy.stats",
    "PIL.Image",
    "tqdm",
)


def prefix() -> str:
    """What a shell runs before a step: strict mode, this Python and first of all the library beside this
    file, whatever else is installed; `python` is the client, `$TCORE` the folder that has scripts/."""
    from pathlib import Path
    from shlex import quote

    own = Path(__file__).absolute()
    root = quote(str(own.parents[2]))
    return (
        f"set -euo pipefail; export PATH={quote(str(Path(sys.executable).parent))}:$PATH"
        f" TCORE={root} PYTHONPATH={root}${{PYTHONPATH:+:$PYTHONPATH}}; "
        f'python() {{ command python -I -S {quote(str(own))} "$@"; }}; '
    )


def start():
    """Starts a server that ends with this process and that its later children know; keep what is returned.

    Linux only; elsewhere steps are plain Python.
    """
    import secrets
    import subprocess

    if sys.platform != "linux":
        return None
    name = f"tcore-{secrets.token_hex(16)}"
    one_thread = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
    server = subprocess.Popen(
        [sys.executable, "-P", __file__, "--serve", name],
        stdin=subprocess.PIPE,  # closes when we end, however that happens
        stdout=subprocess.PIPE,
        env=os.environ | one_thread,
    )
    if server.stdout.readline():  # listening
        os.environ[ADDRESS] = name
    return server


def serve(name: str) -> list[str]:
    """Returns in a step's process only, with the step's arguments."""
    import gc
    import importlib
    import select
    import signal
    import struct

    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(f"\0{name}")
    listening.listen(64)
    print("listening", flush=True)
    for library in LOADED:
        importlib.import_module(library)
    gc.freeze()  # so that a step's collector leaves the memory that it shares alone
    interrupted = signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while sys.stdin not in select.select([sys.stdin, listening], [], [])[0]:
        client = listening.accept()[0]
        user = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
        if user == os.getuid() and os.fork() == 0:
            listening.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            arguments = mind(client)
            signal.signal(signal.SIGINT, interrupted)
            return arguments
        client.close()
    os._exit(0)


def mind(client: socket.socket) -> list[str]:
    """Forks a step, tells the client its exit code, kills it if the client is gone; returns in the step."""
    import json
    import select
    import signal

    request, streams, _, _ = socket.recv_fds(client, 1 << 20, 3)
    while not request.endswith(b"\n"):
        request += client.recv(1 << 20)
    step = json.loads(request)
    pid = os.fork()
    if pid:
        ended = os.pidfd_open(pid)
        if ended in select.select([ended, client], [], [])[0]:
            client.sendall(b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        else:
            os.kill(pid, signal.SIGKILL)
        os._exit(0)
    client.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(step["folder"])
    os.environ.clear()
    os.environ.update(step["environment"])
    sys.modules["torch"].set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count()))
    folders = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:0] = [os.path.dirname(os.path.abspath(step["arguments"][0])), *folders]
    return step["arguments"]


def run(arguments: list[str]) -> int:
    """Runs a script as Python would; returns its exit code."""
    import runpy
    import traceback

    sys.argv = arguments
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    """`python <arguments>`, by the server if there is one."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        server.connect(f"\0{os.environ[ADDRESS]}")
    except (KeyError, OSError):
        os.execvp("python", ["python", *sys.argv[1:]])
    import json

    step = {"arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}
    request = json.dumps(step).encode() + b"\n"
    sent = socket.send_fds(server, [request], [0, 1, 2])
    server.sendall(request[sent:])
    code = int(server.makefile().readline() or 1)
    sys.exit(code if code >= 0 else 128 - code)  # as a shell puts it


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        ended = run(serve(sys.argv[2]))
        sys.stdout.flush()
        os._exit(ended)  # taking the libraries down would take as long as loading them
    else:
        main()
