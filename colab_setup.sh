#!/usr/bin/env bash
# bash colab_setup.sh             install what the suite needs
# bash colab_setup.sh run [...]   install, then run notebook 01 headless; extra words go to papermill (-p profile quick)
# bash colab_setup.sh test [...]  install, then lint and run the fast tests; extra words go to pytest instead
# bash colab_setup.sh slow [...]  install, then run what takes long: kills, full disks, PostgreSQL, workers, benchmarks; extra words likewise
# bash colab_setup.sh generic     install, then run the tests of numbers with the code that an old processor would run
# bash colab_setup.sh browser     install, then drive the notebooks in JupyterLab with headless Chromium
# bash colab_setup.sh colab       install the versions that Colab has into .venv-colab, then run the notebooks there; colab install:
#                                 no more than that
# bash colab_setup.sh compat END  install one end of the ranges of requirements.txt into .venv-END, then run the fast tests there:
#                                 lowest (Python 3.10), colab (3.13, Colab's torch too) or newest; no part of CI
# bash colab_setup.sh --help      print this
#
# Outside Colab everything goes into .venv; in a Colab runtime into the runtime, where torch and numpy are never changed.
# The notebooks' first cell names its own Python in BKLM_PYTHON; that one is treated as Colab's is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

step="starting"
trap 'echo "colab_setup.sh: failed while $step (line $LINENO); the message above says why." >&2' ERR

fail() {
    trap - ERR
    echo "colab_setup.sh: $1" >&2
    exit "${2:-1}"
}

usage() { # the lines at the head of this file
    sed -n '2,/^set /s/^# \{0,1\}//p' colab_setup.sh
}

in_prepared_runtime() {
    [ -z "${BKLM_PYTHON:-}" ] || return 0
    # COLAB_RELEASE_TAG alone is set on Kaggle too.
    [ -n "${COLAB_RELEASE_TAG:-}" ] && python3 -c 'import google.colab' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
            command -v "$candidate"
            return
        fi
    done
    fail "needs Python 3.10 or newer; $(python3 --version 2>&1 || echo 'no python3') was found. Install one and run this again."
}

install() { # the word given says what else than the suite to install: test, or test,browser
    local extra="${1:-}"
    if in_prepared_runtime; then
        PY=${BKLM_PYTHON:-$(command -v python3)}
        step="adding missing packages to $PY"
        "$PY" scripts/install.py --keep-installed ${extra:+--extra "$extra"} ||
            fail "could not add the missing packages to $PY; the message above says why."
        return
    fi
    PY="$PWD/.venv/bin/python"
    make_environment .venv "${extra:-suite}" "$(find_python)" ${extra:+--extra "$extra"}
}

make_environment() { # folder, name of its stamp, Python to make it from, words for scripts/install.py
    local folder=$1 stamp="$1/installed-$2" python=$3 want
    [ -n "$python" ] || exit 1
    if ! "$folder/bin/python" -c 'import pip' 2>/dev/null; then
        step="creating the virtual environment $folder"
        [ -w . ] || fail "cannot write to $PWD, where $folder belongs; copy it to a folder you may write to, or name a Python that has the packages in BKLM_PYTHON."
        "$python" -m venv --clear "$folder" ||
            fail "could not create $folder; on Debian and Ubuntu the package python3-venv provides what is missing."
    fi
    want="$PWD $2 $(cat requirements.txt pyproject.toml constraints/*.txt scripts/install.py | cksum)"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
        step="installing the packages of requirements.txt into $folder"
        echo "Installing into $folder (several minutes the first time) ..."
        "$folder/bin/python" scripts/install.py "${@:4}" ||
            fail "could not install the packages into $folder; the message above says why." # set -e is off behind &&
        echo "$want" >"$stamp"
    fi
}

run() {
    local name=01_grad_blend_sweep output_dir running reached="" status=0
    set -- -p headless True -p dataset embedded "$@"
    output_dir=$("$PY" -m bklm.batch.papermill_words "notebooks/$name.ipynb" "$@") || exit
    step="running notebooks/$name.ipynb"
    mkdir -p "$output_dir" || fail "cannot create $output_dir; choose another folder with -p output_dir DIR."
    running="$output_dir/$name.running.ipynb"
    echo "Running notebooks/$name.ipynb; results go to $output_dir/"
    "$PY" -m papermill "notebooks/$name.ipynb" "$running" --cwd . --kernel python3 --no-progress-bar --log-level ERROR \
        --stdout-file - "$@" 2>"$output_dir/.papermill.log" || status=$?
    if [ "$status" -ne 0 ]; then
        if mv "$running" "$output_dir/$name.failed.ipynb" 2>/dev/null; then
            reached="; the notebook up to there is $output_dir/$name.failed.ipynb"
        fi
        # Without a line left grep fails, and what stands below would not be said.
        { grep -v '^\s*$' "$output_dir/.papermill.log" || true; } | tail -n 3 >&2
        fail "notebook $name stopped (the reason is above)$reached." "$status"
    fi
    step="adding the executed notebook to the results zip"
    mv "$running" "$output_dir/$name.ipynb"
    printf '\nThe executed notebook and its HTML are now in the zip too:\n'
    "$PY" -m bklm.harness.bundle "$output_dir/grad_blend" --notebook "$output_dir/$name.ipynb"
    rm "$output_dir/$name.ipynb" "$output_dir/.papermill.log"
}

run_tests() {
    step="checking style with ruff"
    "$PY" -m ruff check .
    "$PY" -m ruff format --check .
    step="running the fast tests"
    if [ $# -gt 0 ]; then
        in_parallel "$@"
    else
        in_parallel -m "not slow and not speed" --ignore tests/browser
        step="running the tests that compare times"
        # Alone: what two workers do to each other would be measured too.
        OMP_NUM_THREADS=1 "$PY" -m pytest -m "speed and not slow" --ignore tests/browser
    fi
}

run_slow_tests() {
    step="running the slow tests"
    # Whole notebooks are run by the colab lane, on the versions that most of their readers have.
    [ $# -gt 0 ] || set -- -m slow --ignore tests/browser --ignore tests/notebooks/test_notebooks.py
    in_parallel "$@"
}

in_parallel() { # words for pytest
    # One worker a core, each with one thread: threads of several workers would wait for one another.
    OMP_NUM_THREADS=1 "$PY" -m pytest -n logical --maxprocesses 4 --dist loadfile "$@"
}

run_generic_tests() {
    local name words=(-m "not slow and not speed" tests)
    step="running the tests of numbers as on an old processor"
    # What is left out asks for files, words and order, or computes with what the others test.
    for name in browser faults harness notebooks sharing studies trained test_{architecture,batch,benchmarks}.py \
        test_{command,config,documents,fuzz_configs,locks,processes,reporting,security,setup}.py; do
        words+=(--ignore "tests/$name")
    done
    [ $# -gt 0 ] || set -- "${words[@]}"
    # torch's own kernels, oneDNN's, MKL's, and numba's code: each picks what suits the processor unless it is told.
    ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=COMPATIBLE NUMBA_CPU_NAME=generic in_parallel "$@"
}

run_like_colab() { # install: no more than that
    local python candidate
    [[ "${1:-install}" = install ]] || fail "colab: got '$1'; allowed are no word and install." 2
    python=$(find_python)
    # Colab's Python is 3.13; pyenv keeps versions that are not on the PATH.
    for candidate in python3.13 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python; do
        if "$candidate" -c 'pass' 2>/dev/null; then python=$candidate && break; fi
    done
    PY="$PWD/.venv-colab/bin/python"
    make_environment .venv-colab test "$python" --like-colab --extra test
    [ -z "${1:-}" ] || return 0
    step="running the notebooks on Colab's versions"
    # The second file writes data sets with one environment's version of datasets and reads them with the other's. Most of the
    # time goes into one file, so its tests are shared out one by one.
    in_parallel -m "slow or not slow" -W ignore::DeprecationWarning tests/notebooks tests/data/test_dataset_versions.py \
        --ignore tests/notebooks/test_study_run.py --dist worksteal
}

run_at_the_end() { # lowest, colab or newest; extra words go to pytest instead
    local which=${1:-} wanted python="" candidate version folder status=0
    case "$which" in
    lowest) wanted="3.10" ;;
    colab) wanted="3.13" ;;
    newest) wanted="3.15 3.14 3.13 3.12" ;;
    *) fail "compat: got '$which'; allowed are lowest, colab and newest." 2 ;;
    esac
    shift
    for version in $wanted; do
        for candidate in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version".*/bin/python; do
            if [ -z "$python" ] && "$candidate" -c 'pass' 2>/dev/null; then python=$candidate; fi
        done
    done
    [ -n "$python" ] || fail "compat $which: needs Python ${wanted// / or }; install one and run this again."
    PY="$PWD/.venv-$which/bin/python"
    [ "$which" != colab ] || PY="$PWD/.venv-compat-colab/bin/python"
    folder=${PY%/bin/python}
    make_environment "$folder" "$which" "$python" --versions "$which" --extra test
    step="running the fast tests with the $which versions"
    "$PY" -m pip list --format freeze | tee "$folder/versions.txt"
    [ $# -gt 0 ] || set -- -m "not slow" --ignore tests/browser -W ignore::DeprecationWarning
    OMP_NUM_THREADS=1 "$PY" -m pytest "$@" | tee "$folder/pytest.txt" || status=$?
    # A row of docs/compatibility.md: what pytest counted, with the day and the words it was given.
    echo "$(date -u +%F), $(uname -s), $("$PY" --version), pytest $*: $(tail -n 1 "$folder/pytest.txt")" | tee -a "$folder/outcomes.txt"
    return "$status"
}

case "${1:-}" in
"") install && echo "Installed. Next: bash colab_setup.sh run" ;;
run) shift && install && run "$@" ;;
test) shift && install test && run_tests "$@" ;;
slow) shift && install test && run_slow_tests "$@" ;;
generic) shift && install test && run_generic_tests "$@" ;;
browser) shift && install test,browser && step="driving the notebooks" && "$PY" -m pytest -m slow tests/browser "$@" ;;
colab) shift && run_like_colab "$@" ;;
compat) shift && run_at_the_end "$@" ;;
-h | --help | help) usage ;;
*) fail "got '$1'; allowed are no word (install), 'run', 'test', 'slow', 'generic', 'browser', 'colab', 'compat' and '--help'." 2 ;;
esac
