#!/bin/sh
# One library of the simulated kernel: build.sh OUT.so LANES KW HEAD_DIM G NMAX
set -eu
out=$(realpath -m "$1"); here=$(cd "$(dirname "$0")" && pwd); work="$out.build"
mkdir -p "$work"
verilator --cc --build -O3 --x-assign unique --x-initial unique --noassert -Wno-fatal -Wno-WIDTH -Wno-UNUSED -Wno-SYMRSVDWORD \
    --top-module cec_kernel -GLANES=$2 -GKW=$3 -GHEAD_DIM=$4 -GG=$5 -GNMAX=$6 \
    -CFLAGS "-fPIC -O2 -DLANES=$2" --Mdir "$work" "$here"/../rtl/*.v > "$work/log" 2>&1 || { tail -20 "$work/log" >&2; exit 1; }
root=$(verilator --getenv VERILATOR_ROOT)
g++ -shared -fPIC -O2 -DLANES=$2 -I "$work" -I "$root/include" -I "$root/include/vltstd" -o "$out.part" "$here/cec_sim.cpp" \
    "$root/include/verilated.cpp" "$root/include/verilated_threads.cpp" "$work/Vcec_kernel__ALL.a" -lpthread
mv "$out.part" "$out"
rm -rf "$work"
