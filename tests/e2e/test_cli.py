# SPDX-License-Identifier: Apache-2.0
"""The commands as a user types them: help, errors that name cause and remedy, chat, profile, configuration."""
import ctypes, pathlib, sys, threading
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tools"))
from tandem_e2e import *


def run(*args, **kw):
    r = subprocess.run([TANDEM, *args], capture_output=True, text=True, timeout=60 * SLOW, **kw)
    return r.returncode, r.stdout, r.stderr


def help_and_version():
    code, out, _ = run("help")
    check(code == 0 and "serve" in out and "chat" in out, out)
    check(run()[0] == 2, "no command is a usage error")
    code, out, _ = run("version")
    check(code == 0 and re.match(r"tandem \d+\.\d+\.\d+ \(commit ", out), out)
    for c in ("serve", "chat", "router", "prefill-worker", "decode-worker", "profile"):
        code, out, _ = run(c, "--help", "all")
        check(code == 0 and "--" in out, (c, out))
    check("--max-queue" in run("router", "--help", "queue")[1], "--help WORD")
    check("--listen" in run("help", "serve")[1], "help COMMAND")
    for c in ("router", "prefill-worker", "decode-worker"):  # what was typed, not the program's other name
        check(run(c, "--help")[1].startswith(f"usage: tandem {c} --model"), c)
        other = str(pathlib.Path(TANDEM).parent / f"tandem-{c}")
        r = subprocess.run([other, "--help"], capture_output=True, text=True, timeout=60 * SLOW)
        check(r.stdout.startswith(f"usage: tandem-{c} --model"), (c, r.stdout, r.stderr))
        check(run(c, "extra")[2].startswith(f"tandem {c}: "), c)
    for c in ("config", "bench", "completion", "version"):
        code, out, _ = run(c, "--help")
        check(code == 0 and out.startswith(f"usage: tandem {c}"), (c, out))


def mistakes_are_explained():
    cases = [(("sevre",), "did you mean 'serve'"), (("serve", "/nonexistent"), "serve: /nonexistent: "),
             (("serve", "/etc"), "/etc/config.json"), (("serve", "/etc/passwd"), "not a directory"), (("serve", MODEL, "extra"), "'extra'"),
             (("chat", "extra"), "'extra'"), (("profile", MODEL, "extra"), "'extra'"), (("router", "extra"), "'extra'"),
             (("prefill-worker", "extra"), "'extra'"), (("version", "extra"), "'extra'"), (("bench", "nothing"), "there are:"),
             (("serve",), "give a model directory"), (("router", "--lisen", "x"), "did you mean 'listen'"),
             (("router", "--max-queue", "0"), "between 1 and"), (("serve", MODEL, "--listen", "0.0.0.0:0"), "0.0.0.0"),
             (("router", "--model", MODEL, "--control", "tcp://0.0.0.0:5555"), "0.0.0.0"),
             (("router", "--model", MODEL, "--control", "tcp://8.8.8.8:5555"), "keys"),
             (("chat", "--url", "http://127.0.0.1:9", "--prompt", "x"), "127.0.0.1:9"), (("profile", "/nonexistent"), "/nonexistent"),
             (("profile", MODEL, "--listen", "x"), "listen")]
    for args, text in cases:
        code, out, err = run(*args)
        check(code != 0 and text in err, (args, code, out, err))


def environment_and_file():
    with tempfile.TemporaryDirectory() as tmp:
        f = pathlib.Path(tmp) / "t.conf"
        f.write_text("[common]\nlog-level = warn\n[router]\nmax-queue = 7\n")
        code, out, err = run("config", "check", str(f), env={**os.environ, "TANDEM_ROUTER_MAX_QUEUE": "9"})
        check(code == 0 and re.search(r"max-queue +9 +\(environment\)", out), out + err)
        f.write_text("[router]\nmax-quue = 7\n")
        code, out, err = run("config", "check", str(f))
        check(code == 2 and "max-queue" in err and ":2" in err, err)


def profile_prints():
    code, out, err = run("profile", MODEL)
    check(code == 0 and "profile_id" in out and "backend=" in out and "rev." in out, out + err)
    f32 = run("profile", MODEL, "--act", "f32")[1]
    check(f32 != out, "act is part of the profile")


def devices_are_said():
    """A GPU that is not there is an error with a remedy, or, of auto, a word about what serves in its place."""
    libraries = {"hip": [f"libamdhip64.so.{n}" for n in (5, 6, 7)], "cuda": ["libcuda.so.1"]}
    absent = {}
    for kind, names in libraries.items():
        absent[kind] = True
        for name in names:
            try:
                ctypes.CDLL(name)
                absent[kind] = False
            except OSError:
                pass
    for kind in (k for k in libraries if absent[k]):
        for c in (("profile", MODEL), ("prefill-worker", "--model", MODEL), ("decode-worker", "--model", MODEL),
                  ("eval", MODEL, "--problems", "models/eval/heldout.jsonl")):
            code, out, err = run(*c, "--device", kind)
            check(code == 1 and "driver" in err and libraries[kind][-1] in err and "install" in err, (c, code, out, err))
    if all(absent.values()):
        code, out, err = run("profile", MODEL, "--device", "auto", "--strict")
        check(code == 0 and "device cpu: no GPU serves (hip: " in err and "backend=cpu" in out, out + err)
    code, _, err = run("profile", MODEL, "--device", "hip", "--isa", "ref")
    check(code == 1 and "--isa ref is for --device cpu" in err, err)
    check(run("profile", MODEL, "--device", "tpu")[0] == 2, "an unknown device")


def chat_once():
    with Server() as s:
        url = f"http://{s.host}:{s.port}"
        code, out, err = run("chat", "--url", url, "--prompt", "What is 23 + 48?", "--temperature", "0")
        check(code == 0 and out.strip(), (code, out, err))
        code, piped, err = run("chat", "--url", url, "--temperature", "0", input="What is 23 + 48?\n")
        check(piped == out, (piped, out))
        code, out, err = run("chat", "--url", url, "--prompt", "word " * 20000)
        check(code == 1 and "maximum context length" in err, err)


def port_in_use_is_said():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        address = "127.0.0.1:%d" % s.getsockname()[1]
        code, _, err = run("serve", MODEL, "--listen", address)
        check(code != 0 and address in err, err)


def worker_without_router_says_so():
    with tempfile.TemporaryDirectory() as tmp:
        p = subprocess.Popen([TANDEM, "prefill-worker", "--model", MODEL, "--control", f"ipc://{tmp}/none.sock"],
                             stderr=subprocess.PIPE, text=True)
        killer = threading.Timer(60 * SLOW, p.kill)
        killer.start()
        lines = [next((x for x in p.stderr if "no_router" in x), "")]
        p.terminate()
        lines += p.stderr
        killer.cancel()
        check("none.sock" in lines[0] and p.wait() == 0, lines)


def completion_is_bash():
    code, out, _ = run("completion", "bash")
    check(code == 0 and subprocess.run(["bash", "-n"], input=out, text=True).returncode == 0, out)


if __name__ == "__main__":
    main(help_and_version, mistakes_are_explained, environment_and_file, profile_prints, devices_are_said, chat_once, port_in_use_is_said,
         worker_without_router_says_so, completion_is_bash)
