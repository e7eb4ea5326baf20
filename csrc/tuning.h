// Processors of one instruction set differ in what is fast. Results are the same bits either way.
#pragma once

namespace penstock {

struct Tuning {
    // Zen 4 takes two turns for 512 bits: loads cost little beside products, and of a long stream it had better be told each
    // fourth line only. All others are taken for what was measured on Zen 5.
    bool halves_vectors;
};

// Of this machine, unless `tune` said otherwise (for tests and benchmarks).
const Tuning& tuning();
Tuning tune(Tuning wanted);  // returns what it was

}  // namespace penstock
