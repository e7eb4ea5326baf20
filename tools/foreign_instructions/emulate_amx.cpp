// AMX instructions that trap (SIGILL) are carried out here: the machine code of the AMX kernels runs on any x86-64 machine
// that has what else it needs. Preloaded into a process (LD_PRELOAD); see run_tests.py.
//
// Written from Intel's instruction set reference, not from csrc/: what that says to be an error, or what the kernels never
// use, ends the process. bf16 products are added one by one; hardware adds them in an order of its own.
#include <signal.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>

namespace {

constexpr int kTiles = 8, kMaxRows = 16, kMaxRowBytes = 64;

struct Tile {
    int rows, row_bytes;
    uint8_t bytes[kMaxRows][kMaxRowBytes];
};

thread_local Tile tiles[kTiles];  // all zero: not configured
std::atomic<int64_t> num_emulated{0};

// A three-byte VEX instruction of the map 0F38, as all of AMX are.
class Instruction {
public:
    Instruction(const uint8_t* at, const greg_t* registers) : begin_(at), at_(at + 5), registers_(registers) {
        require(at[0] == 0xc4 && (at[1] & 31) == 2 && (at[2] & 0x84) == 0, "no AMX instruction");
        vector = 15 - (at[2] >> 3 & 15);
        prefix = at[2] & 3;
        opcode = at[3];
        const bool is_upper_reg = !(at[1] & 0x80);
        is_upper_index_ = !(at[1] & 0x40);
        is_upper_base_ = !(at[1] & 0x20);
        mode_ = at[4] >> 6;
        reg = (at[4] >> 3 & 7) | is_upper_reg << 3;
        rm = (at[4] & 7) | (mode_ == 3 ? is_upper_base_ << 3 : 0);
        if (mode_ != 3) read_address();
    }
    bool has_address() const { return mode_ != 3; }
    uint8_t* address(int64_t row = 0) const { return reinterpret_cast<uint8_t*>(address_ + uint64_t(row) * stride_); }
    const uint8_t* end() const { return at_; }
    void require(bool condition, const char* reason) const {
        if (condition) return;
        fprintf(stderr, "AMX emulator: %s:", reason);
        for (int i = 0; i < 12; ++i) fprintf(stderr, " %02x", begin_[i]);
        fprintf(stderr, "\n");
        _exit(99);
    }

    int opcode, prefix, vector, reg, rm;
    bool has_index = false;

private:
    uint64_t value(int number) const {
        constexpr int kOrder[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                    REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
        return uint64_t(registers_[kOrder[number]]);
    }
    int64_t displacement(int bytes) {
        int32_t wide = 0;
        if (bytes == 4) memcpy(&wide, at_, 4);
        const int64_t result = bytes == 1 ? int8_t(*at_) : wide;
        at_ += bytes;
        return result;
    }
    void read_address() {
        if (rm == 4) {
            const int sib = *at_++, index = (sib >> 3 & 7) | is_upper_index_ << 3;
            const bool has_base = (sib & 7) != 5 || mode_ != 0;
            has_index = index != 4;
            stride_ = has_index ? value(index) << (sib >> 6) : 0;
            address_ = has_base ? value((sib & 7) | is_upper_base_ << 3) : 0;
            address_ += uint64_t(displacement(!has_base || mode_ == 2 ? 4 : mode_));
        } else if (rm == 5 && mode_ == 0) {
            address_ = uint64_t(displacement(4));
            address_ += uint64_t(at_);
        } else {
            address_ = value(rm | is_upper_base_ << 3) + uint64_t(displacement(mode_ == 2 ? 4 : mode_));
        }
    }

    const uint8_t *begin_, *at_;
    const greg_t* registers_;
    int mode_;
    bool is_upper_index_, is_upper_base_;
    uint64_t address_ = 0, stride_ = 0;
};

void configure(const Instruction& instruction) {
    uint8_t config[64];
    memcpy(config, instruction.address(), sizeof config);
    for (int i = 1; i < 16; ++i) instruction.require(config[i] == 0, "start row or reserved bytes");
    instruction.require(config[0] == 1, "palette");
    for (int i = 0; i < 16; ++i) {
        uint16_t row_bytes;
        memcpy(&row_bytes, config + 16 + 2 * i, 2);
        const int rows = config[48 + i];
        instruction.require(i < kTiles || (rows == 0 && row_bytes == 0), "a tile above 7");
        if (i >= kTiles) continue;
        instruction.require(rows <= kMaxRows && row_bytes <= kMaxRowBytes && (rows == 0) == (row_bytes == 0), "shape");
        tiles[i] = {rows, row_bytes, {}};
    }
}

Tile& tile(const Instruction& instruction, int number) {
    instruction.require(number < kTiles && tiles[number].rows > 0, "a tile that is not configured");
    return tiles[number];
}

void load(const Instruction& instruction, Tile& to) {
    memset(to.bytes, 0, sizeof to.bytes);
    for (int r = 0; r < to.rows; ++r) memcpy(to.bytes[r], instruction.address(r), size_t(to.row_bytes));
}

void store(const Instruction& instruction, const Tile& from) {
    for (int r = 0; r < from.rows; ++r) memcpy(instruction.address(r), from.bytes[r], size_t(from.row_bytes));
}

float float_of_bf16(const uint8_t* bytes) {
    const uint32_t bits = uint32_t(bytes[0]) << 16 | uint32_t(bytes[1]) << 24;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

void add_products(uint8_t* sum, const uint8_t* a, const uint8_t* b, bool is_a_signed, bool is_b_signed) {
    uint32_t total;
    memcpy(&total, sum, 4);
    for (int i = 0; i < 4; ++i)
        total += uint32_t((is_a_signed ? int8_t(a[i]) : int(a[i])) * (is_b_signed ? int8_t(b[i]) : int(b[i])));
    memcpy(sum, &total, 4);
}

void add_products_bf16(uint8_t* sum, const uint8_t* a, const uint8_t* b) {
    float total;
    memcpy(&total, sum, 4);
    for (int i = 0; i < 4; i += 2) total = std::fmaf(float_of_bf16(a + i), float_of_bf16(b + i), total);
    memcpy(sum, &total, 4);
}

void multiply(const Instruction& instruction) {
    Tile& sums = tile(instruction, instruction.reg);
    const Tile &a = tile(instruction, instruction.rm), &b = tile(instruction, instruction.vector);
    instruction.require(&sums != &a && &sums != &b && &a != &b, "a tile that is used twice");
    instruction.require(sums.rows == a.rows && sums.row_bytes == b.row_bytes && a.row_bytes == 4 * b.rows &&
                            b.row_bytes % 4 == 0,
                        "shapes that do not go together");
    const bool is_bf16 = instruction.opcode == 0x5c;
    instruction.require(!is_bf16 || instruction.prefix == 2, "a product that is unknown here");
    // Of bytes: tdpbuud, tdpbusd, tdpbsud, tdpbssd.
    const bool is_a_signed = instruction.prefix >= 2, is_b_signed = instruction.prefix % 2 == 1;
    for (int r = 0; r < sums.rows; ++r)
        for (int u = 0; u < b.rows; ++u)
            for (int column = 0; column < sums.row_bytes; column += 4) {
                uint8_t* sum = sums.bytes[r] + column;
                if (is_bf16)
                    add_products_bf16(sum, a.bytes[r] + 4 * u, b.bytes[u] + column);
                else
                    add_products(sum, a.bytes[r] + 4 * u, b.bytes[u] + column, is_a_signed, is_b_signed);
            }
}

void emulate(int, siginfo_t*, void* context) {
    greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    const Instruction instruction(reinterpret_cast<const uint8_t*>(registers[REG_RIP]), registers);
    const int prefix = instruction.prefix;
    if (instruction.opcode == 0x5e || instruction.opcode == 0x5c) {
        instruction.require(!instruction.has_address(), "a product with memory");
        multiply(instruction);
    } else if (instruction.opcode == 0x4b) {  // tileloadd, tilestored
        instruction.require(instruction.has_index && (prefix == 3 || prefix == 2), "an access that is unknown here");
        Tile& its = tile(instruction, instruction.reg);
        prefix == 3 ? load(instruction, its) : store(instruction, its);
    } else if (instruction.opcode == 0x49 && prefix == 3) {  // tilezero
        Tile& its = tile(instruction, instruction.reg);
        memset(its.bytes, 0, sizeof its.bytes);
    } else {  // ldtilecfg, tilerelease
        instruction.require(instruction.opcode == 0x49 && prefix == 0 && instruction.reg == 0, "unknown");
        if (instruction.has_address())
            configure(instruction);
        else
            memset(tiles, 0, sizeof tiles);
    }
    registers[REG_RIP] = greg_t(instruction.end());
    ++num_emulated;
}

__attribute__((constructor)) void install() {
    struct sigaction action = {};
    action.sa_sigaction = emulate;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &action, nullptr);
}

__attribute__((destructor)) void report() {
    if (num_emulated > 0) fprintf(stderr, "%ld AMX instructions were emulated\n", long(num_emulated));
}

}  // namespace
