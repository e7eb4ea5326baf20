// The block kernel made of matrix tiles (AMX): up to 32 rows of x by up to 4 tiles of 16 outputs, bf16.
//
// It is written over a class of eight tile registers, so that a plain emulation of them runs the same loop where there
// is no AMX (tests/kernels/test_linear.py). x is loaded as it lies, a tile of the weight is 16 units of a packed tile.
// All sizes of a batch go through tiles, one row too: the multipliers of AMX and AVX-512 round differently, and a row's
// result must not depend on its batch.
#pragma once

#include "ops/linear_block.h"

namespace penstock::PENSTOCK_ISA {

constexpr int kTileRows = 16;   // rows of a tile register, and units of k that one multiplication takes
constexpr int kTileRegisters = 8;
// Registers: accumulators 0 to 3, x in 4 and 5, the weight in 6 and 7 by turns.
constexpr int kXRegister = 4, kWeightRegister = 6;

// Eight registers of `rows[i]` rows of 16 units (f32 accumulators, or pairs of bf16).
class EmulatedTiles {
public:
    void configure(const uint8_t (&rows)[kTileRegisters]) { memcpy(rows_, rows, sizeof rows_); }
    void release() {}

    template <int kTile>
    void zero() {
        memset(units_[kTile], 0, sizeof units_[kTile]);
    }
    template <int kTile>
    void load(const void* from, int64_t stride_bytes) {
        for (int r = 0; r < rows_[kTile]; ++r)
            memcpy(units_[kTile][r], static_cast<const char*>(from) + r * stride_bytes, sizeof units_[kTile][r]);
    }
    template <int kTile>
    void store(void* to, int64_t stride_bytes) const {
        for (int r = 0; r < rows_[kTile]; ++r)
            memcpy(static_cast<char*>(to) + r * stride_bytes, units_[kTile][r], sizeof units_[kTile][r]);
    }
    // sums[r][c] += the sum over u of x[r][u] . weight[u][c]
    template <int kSums, int kX, int kWeight>
    void multiply() {
        for (int r = 0; r < rows_[kSums]; ++r)
            for (int c = 0; c < kTileColumns; ++c) {
                float lower = 0.f, upper = 0.f;
                for (int u = 0; u < kTileRows; ++u) {
                    const uint32_t a = units_[kX][r][u], b = units_[kWeight][u][c];
                    lower += f32_from_bits(a << 16) * f32_from_bits(b << 16);
                    upper += f32_from_bits(a & 0xffff0000u) * f32_from_bits(b & 0xffff0000u);
                }
                units_[kSums][r][c] = bits_of(f32_from_bits(units_[kSums][r][c]) + (lower + upper));
            }
    }

private:
    uint8_t rows_[kTileRegisters] = {};
    uint32_t units_[kTileRegisters][kTileRows][kTileColumns];
};

#if PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AMX

// In assembly because GCC's intrinsics take register numbers as tokens only, not as template arguments.
class AmxTiles {
public:
    void configure(const uint8_t (&rows)[kTileRegisters]) {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int i = 0; i < kTileRegisters; ++i) {
            config.row_bytes[i] = kTileRowBytes;
            config.rows[i] = rows[i];
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
    void multiply() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kX), "i"(kWeight));
    }
};

#endif

template <class Tiles>
class TileKernel {
public:
    using Elem = Bf16;
    static constexpr int kRows = 2 * kTileRows, kTiles = 4;

    TileKernel() = default;
    TileKernel(const TileKernel&) = delete;
    TileKernel& operator=(const TileKernel&) = delete;
    ~TileKernel() {
        if (configured_rows_ > 0) tiles_.release();
    }

    void multiply(const Block& block, int rows, int tiles) {
        configure(rows);
        const int64_t sums_stride = int64_t(tiles) * kTileColumns;
        if (rows <= kTileRows) {
            switch (tiles) {
                case 1: return multiply_part<1, 1>(block, rows, 0, sums_stride);
                case 2: return multiply_part<1, 2>(block, rows, 0, sums_stride);
                case 3: return multiply_part<1, 3>(block, rows, 0, sums_stride);
                default: return multiply_part<1, 4>(block, rows, 0, sums_stride);
            }
        }
        for (int tile = 0; tile + 2 <= tiles; tile += 2) multiply_part<2, 2>(block, rows, tile, sums_stride);
        if (tiles % 2) multiply_part<2, 1>(block, rows, tiles - 1, sums_stride);
    }

private:
    void configure(int rows) {
        if (rows == configured_rows_) return;
        configured_rows_ = rows;
        const auto upper = uint8_t(rows < kTileRows ? rows : kTileRows);
        const auto lower = uint8_t(rows > kTileRows ? rows - kTileRows : 0);
        // With 32 rows, accumulators 0 and 1 are of the upper 16, 2 and 3 of the lower.
        const auto second = rows > kTileRows ? lower : upper;
        const auto unused = uint8_t(1);
        tiles_.configure({upper, upper, second, second, upper, lower > 0 ? lower : unused, kTileRows, kTileRows});
    }

    // kRowTiles x kColumnTiles accumulators over all units of the block.
    template <int kRowTiles, int kColumnTiles>
    void multiply_part(const Block& block, int rows, int first_tile, int64_t sums_stride) {
        const char* weight = block.weight + first_tile * block.tile_stride;
        float* sums = block.sums + first_tile * kTileColumns;
        const int64_t stride_bytes = sums_stride * int64_t(sizeof(float));
        for_each_sum<kRowTiles, kColumnTiles>([&]<int kRow, int kColumn>() {
            constexpr int kSums = accumulator<kRowTiles>(kRow, kColumn);
            if (block.first)
                tiles_.template zero<kSums>();
            else
                tiles_.template load<kSums>(sums + kRow * kTileRows * sums_stride + kColumn * kTileColumns, stride_bytes);
        });
        const int64_t whole = block.units / kTileRows * kTileRows;
        for (int64_t u = 0; u < whole; u += kTileRows) {
            prefetch(block.prefetch, u);
            step<kRowTiles, kColumnTiles>(block.x + u, block.x_stride * 4, weight + u * kTileRowBytes, block.tile_stride);
        }
        if (whole < block.units) last_step<kRowTiles, kColumnTiles>(block, rows, weight, whole);
        for_each_sum<kRowTiles, kColumnTiles>([&]<int kRow, int kColumn>() {
            tiles_.template store<accumulator<kRowTiles>(kRow, kColumn)>(
                sums + kRow * kTileRows * sums_stride + kColumn * kTileColumns, stride_bytes);
        });
    }

    template <int kRowTiles>
    static constexpr int accumulator(int row, int column) {
        return kRowTiles == 1 ? column : row * 2 + column;
    }

    template <int kRowTiles, int kColumnTiles, class Function>
    static void for_each_sum(Function function) {
        for_each_column<kColumnTiles>([&]<int kColumn>() {
            function.template operator()<0, kColumn>();
            if constexpr (kRowTiles > 1) function.template operator()<1, kColumn>();
        });
    }

    template <int kColumnTiles, class Function>
    static void for_each_column(Function function) {
        function.template operator()<0>();
        if constexpr (kColumnTiles > 1) function.template operator()<1>();
        if constexpr (kColumnTiles > 2) function.template operator()<2>();
        if constexpr (kColumnTiles > 3) function.template operator()<3>();
    }

    // Sixteen units of k.
    template <int kRowTiles, int kColumnTiles>
    void step(const uint32_t* x, int64_t x_stride_bytes, const char* weight, int64_t tile_stride) {
        tiles_.template load<kXRegister>(x, x_stride_bytes);
        if constexpr (kRowTiles > 1)
            tiles_.template load<kXRegister + 1>(x + kTileRows * x_stride_bytes / 4, x_stride_bytes);
        for_each_column<kColumnTiles>([&]<int kColumn>() {
            constexpr int kWeight = kWeightRegister + kColumn % 2;
            tiles_.template load<kWeight>(weight + kColumn * tile_stride, kTileRowBytes);
            tiles_.template multiply<accumulator<kRowTiles>(0, kColumn), kXRegister, kWeight>();
            if constexpr (kRowTiles > 1)
                tiles_.template multiply<accumulator<kRowTiles>(1, kColumn), kXRegister + 1, kWeight>();
        });
    }

    // The units that are left, out of copies padded with zeros.
    template <int kRowTiles, int kColumnTiles>
    void last_step(const Block& block, int rows, const char* weight, int64_t begin) {
        alignas(64) uint32_t x[kRowTiles * kTileRows][kTileRows] = {};
        alignas(64) char padded[kColumnTiles][kTileRows * kTileRowBytes] = {};
        const auto units = size_t(block.units - begin);
        for (int r = 0; r < rows; ++r) memcpy(x[r], block.x + r * block.x_stride + begin, units * sizeof(uint32_t));
        for (int c = 0; c < kColumnTiles; ++c)
            memcpy(padded[c], weight + c * block.tile_stride + begin * kTileRowBytes, units * size_t(kTileRowBytes));
        step<kRowTiles, kColumnTiles>(x[0], kTileRowBytes, padded[0], kTileRows * kTileRowBytes);
    }

    static void prefetch(const Prefetch& prefetch, int64_t unit) {
        const char* at = prefetch.at + unit * prefetch.step;
        for (int i = 0; i < prefetch.lines; ++i)
            for (int64_t u = 0; u < kTileRows; ++u)
                __builtin_prefetch(at + i * prefetch.distance + u * prefetch.step, 0, 2);
    }

    Tiles tiles_;
    int configured_rows_ = 0;
};

}  // namespace penstock::PENSTOCK_ISA
