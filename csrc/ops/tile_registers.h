// Eight registers of up to 16 rows by 64 bytes (AMX), and a plain emulation of them, so that tests run the loops of the
// kernels made of tiles (linear_tiles.h, quantized_tiles.h) where there is no AMX.
#pragma once

#include "simd.h"

namespace penstock::PENSTOCK_ISA {

constexpr int kTileRows = 16;       // of a register, and units of k that one multiplication takes at most
constexpr int kTileRegisters = 8;
constexpr int kTileLineBytes = 64;  // of a register's row at most

// Sums are [rows of x][16 columns], x is [rows of x][units of k], a weight [units of k][16 columns], all of 4 bytes.
struct TileShape {
    uint8_t rows = 1, row_bytes = kTileLineBytes;
};

// What a unit is, besides a pair of bf16 (whose sums are f32): four signed bytes of x and four codes of the weight, with
// or without a sign, whose sums are exact in 32 bits.
template <bool kIsSigned>
struct Codes {};

// Shapes that do not go together trap, as in hardware. Never inlined: only tests need it, and code is large as it is.
class EmulatedTiles {
public:
    void configure(const TileShape (&shapes)[kTileRegisters]) { memcpy(shapes_, shapes, sizeof shapes_); }
    void release() {}

    template <int kTile>
    void zero() {
        memset(units_[kTile], 0, sizeof units_[kTile]);
    }
    template <int kTile>
    [[gnu::noinline]] void load(const void* from, int64_t stride_bytes) {
        zero<kTile>();
        for (int r = 0; r < shapes_[kTile].rows; ++r)
            memcpy(units_[kTile][r], static_cast<const char*>(from) + r * stride_bytes, shapes_[kTile].row_bytes);
    }
    template <int kTile>
    [[gnu::noinline]] void store(void* to, int64_t stride_bytes) const {
        for (int r = 0; r < shapes_[kTile].rows; ++r)
            memcpy(static_cast<char*>(to) + r * stride_bytes, units_[kTile][r], shapes_[kTile].row_bytes);
    }
    // sums[r][c] += the sum over u of x[r][u] . weight[u][c]
    template <int kSums, int kX, int kWeight>
    [[gnu::noinline]] void multiply(Bf16) {
        check<kSums, kX, kWeight>();
        for (int r = 0; r < shapes_[kSums].rows; ++r)
            for (int c = 0; c < kLanes; ++c) {
                float lower = 0.f, upper = 0.f;
                for (int u = 0; u < shapes_[kWeight].rows; ++u) {
                    const uint32_t a = units_[kX][r][u], b = units_[kWeight][u][c];
                    lower += f32_from_bits(a << 16) * f32_from_bits(b << 16);
                    upper += f32_from_bits(a & 0xffff0000u) * f32_from_bits(b & 0xffff0000u);
                }
                units_[kSums][r][c] = bits_of(f32_from_bits(units_[kSums][r][c]) + (lower + upper));
            }
    }
    template <int kSums, int kX, int kWeight>
    void multiply(Codes<false>) {
        multiply_bytes<kSums, kX, kWeight, uint8_t>();
    }
    template <int kSums, int kX, int kWeight>
    void multiply(Codes<true>) {
        multiply_bytes<kSums, kX, kWeight, int8_t>();
    }

private:
    template <int kSums, int kX, int kWeight>
    void check() const {
        const TileShape &sums = shapes_[kSums], &x = shapes_[kX], &weight = shapes_[kWeight];
        if (sums.rows != x.rows || x.row_bytes != 4 * weight.rows || sums.row_bytes != weight.row_bytes)
            __builtin_trap();
    }
    template <int kSums, int kX, int kWeight, class Code>
    [[gnu::noinline]] void multiply_bytes() {
        check<kSums, kX, kWeight>();
        for (int r = 0; r < shapes_[kSums].rows; ++r)
            for (int u = 0; u < shapes_[kWeight].rows; ++u)
                for (int shift = 0; shift < 32; shift += 8) {
                    const int32_t x = int8_t(units_[kX][r][u] >> shift);
                    for (int c = 0; c < kLanes; ++c)
                        units_[kSums][r][c] += uint32_t(x * Code(units_[kWeight][u][c] >> shift));
                }
    }

    TileShape shapes_[kTileRegisters];
    uint32_t units_[kTileRegisters][kTileRows][kLanes];
};

#if PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AMX

// In assembly because GCC's intrinsics take register numbers as tokens only, not as template arguments.
class AmxTiles {
public:
    void configure(const TileShape (&shapes)[kTileRegisters]) {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int i = 0; i < kTileRegisters; ++i) {
            config.row_bytes[i] = shapes[i].row_bytes;
            config.rows[i] = shapes[i].rows;
        }
        asm volatile("ldtilecfg %0" : : "m"(config));
    }
    void release() { asm volatile("tilerelease"); }

    template <int kTile>
    void zero() {
        asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
    }
    template <int kTile>
    void load(const void* from, int64_t stride_bytes) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride_bytes), "i"(kTile) : "memory");
    }
    template <int kTile>
    void store(void* to, int64_t stride_bytes) const {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride_bytes), "i"(kTile) : "memory");
    }
    template <int kSums, int kX, int kWeight>
    void multiply(Bf16) {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kX), "i"(kWeight));
    }
    template <int kSums, int kX, int kWeight>
    void multiply(Codes<false>) {
        asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kX), "i"(kWeight));
    }
    template <int kSums, int kX, int kWeight>
    void multiply(Codes<true>) {
        asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kX), "i"(kWeight));
    }
};

#endif

// Registers that are configured only where their shapes change, and released at the end.
template <class Tiles>
class ShapedTiles : public Tiles {
public:
    ShapedTiles() = default;
    ShapedTiles(const ShapedTiles&) = delete;
    ShapedTiles& operator=(const ShapedTiles&) = delete;
    ~ShapedTiles() {
        if (is_configured_) this->release();
    }

    void shape(const TileShape (&shapes)[kTileRegisters]) {
        if (is_configured_ && memcmp(shapes, shapes_, sizeof shapes_) == 0) return;
        memcpy(shapes_, shapes, sizeof shapes_);
        this->configure(shapes_);
        is_configured_ = true;
    }

private:
    TileShape shapes_[kTileRegisters];
    bool is_configured_ = false;
};

// Up to 32 rows of x by 2 tiles of a weight, or up to 16 rows by 4, in registers of 16 units: accumulators 0 to 3, x in 4
// and 5, the weight in 6 and 7 by turns.
constexpr int kXRegister = 4, kWeightRegister = 6;

template <class Tiles>
void shape_whole_tiles(ShapedTiles<Tiles>& tiles, int rows) {
    const auto upper = uint8_t(rows < kTileRows ? rows : kTileRows);
    const auto lower = uint8_t(rows > kTileRows ? rows - kTileRows : 1);
    // Of more than 16 rows, accumulators 0 and 1 are of the upper 16, 2 and 3 of the lower.
    const auto second = rows > kTileRows ? lower : upper;
    tiles.shape({{upper}, {upper}, {second}, {second}, {upper}, {lower}, {kTileRows}, {kTileRows}});
}

// The accumulator of x's tile `row` and the weight's tile `column`.
template <int kRowTiles>
constexpr int accumulator(int row, int column) {
    return kRowTiles == 1 ? column : row * 2 + column;
}

template <int kColumnTiles, class Function>
void for_each_column(Function function) {
    function.template operator()<0>();
    if constexpr (kColumnTiles > 1) function.template operator()<1>();
    if constexpr (kColumnTiles > 2) function.template operator()<2>();
    if constexpr (kColumnTiles > 3) function.template operator()<3>();
}

template <int kRowTiles, int kColumnTiles, class Function>
void for_each_sum(Function function) {
    for_each_column<kColumnTiles>([&]<int kColumn>() {
        function.template operator()<0, kColumn>();
        if constexpr (kRowTiles > 1) function.template operator()<1, kColumn>();
    });
}

// Sixteen units of k.
template <class Operands, int kRowTiles, int kColumnTiles, class Tiles>
void multiply_whole_tiles(Tiles& tiles, const void* x, int64_t x_stride, const char* weight, int64_t tile_stride) {
    tiles.template load<kXRegister>(x, x_stride);
    if constexpr (kRowTiles > 1)
        tiles.template load<kXRegister + 1>(static_cast<const char*>(x) + kTileRows * x_stride, x_stride);
    for_each_column<kColumnTiles>([&]<int kColumn>() {
        constexpr int kWeight = kWeightRegister + kColumn % 2;
        tiles.template load<kWeight>(weight + kColumn * tile_stride, kTileLineBytes);
        tiles.template multiply<accumulator<kRowTiles>(0, kColumn), kXRegister, kWeight>(Operands{});
        if constexpr (kRowTiles > 1)
            tiles.template multiply<accumulator<kRowTiles>(1, kColumn), kXRegister + 1, kWeight>(Operands{});
    });
}

}  // namespace penstock::PENSTOCK_ISA
