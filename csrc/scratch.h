// Working memory that a thread keeps between calls: no allocation on the hot path. A class of each instruction set's
// own namespace, so that no out-of-line copy compiled for one set is ever shared with another.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "isa.h"
#include "working_memory.h"

namespace penstock::PENSTOCK_ISA {

template <class T>
class Scratch {
public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { free(data_); }

    // At least `count` elements, uninitialised, 64-byte aligned; what was there before is lost if it has to grow.
    T* at_least(int64_t count) {
        if (count > capacity_) {
            free(data_);
            data_ = nullptr;
            capacity_ = 0;
            data_ = static_cast<T*>(allocate_working_memory(size_t(count) * sizeof(T)));
            capacity_ = count;
        }
        return data_;
    }

private:
    T* data_ = nullptr;
    int64_t capacity_ = 0;
};

}  // namespace penstock::PENSTOCK_ISA
