#!/usr/bin/env bash
# Compiles every file of csrc/ for aarch64 and, where an emulator is at hand, runs the self-test of
# the kernels under it, with the CRC instructions and without. Says "skipped" for what cannot run.
set -euo pipefail

cd "$(dirname "$0")"
compiler=${AARCH64_CXX:-aarch64-linux-gnu-g++}
emulator=${AARCH64_EMULATOR:-qemu-aarch64}
python=${PYTHON:-python3}
flags=(-std=c++20 -O2 -Wall -Wextra -Werror -pthread)

if ! command -v "$compiler" >/dev/null; then
  echo "check_aarch64: skipped: no $compiler"
  exit 0
fi

out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

objects=()
for source in *.cpp; do
  [[ "$source" = module*.cpp ]] && continue
  "$compiler" "${flags[@]}" -c "$source" -o "$out/${source%.cpp}.o"
  objects+=("$out/${source%.cpp}.o")
done
echo "check_aarch64: ${#objects[@]} files compiled"

if includes=$("$python" -c 'import nanobind, sysconfig
print(nanobind.include_dir(), sysconfig.get_path("include"), sysconfig.get_config_var("MULTIARCH"))' 2>/dev/null); then
  read -r nanobind_include python_include multiarch <<<"$includes"
  # Debian keeps pyconfig.h in a folder per architecture. Where there is none for aarch64, that of
  # this machine tells the same: all sizes in it are those of a 64-bit Linux.
  version=${python_include##*/}
  mkdir -p "$out/include/aarch64-linux-gnu"
  if [[ -d "/usr/include/$multiarch/$version" ]]; then
    ln -s "/usr/include/$multiarch/$version" "$out/include/aarch64-linux-gnu/$version"
  fi
  for source in module*.cpp; do
    "$compiler" "${flags[@]}" -isystem "$nanobind_include" -isystem "$python_include" \
      -isystem "$out/include" -c "$source" -o "$out/${source%.cpp}.module"
  done
  echo "check_aarch64: the Python module compiled"
else
  echo "check_aarch64: the Python module skipped: $python has no nanobind"
fi

if ! command -v "$emulator" >/dev/null; then
  echo "check_aarch64: self-test skipped: no $emulator"
  exit 0
fi
"$compiler" -static -pthread "${objects[@]}" -o "$out/selftest"
"$emulator" -cpu max "$out/selftest"
EVERSTEP_PORTABLE_KERNELS=1 "$emulator" -cpu max "$out/selftest"
