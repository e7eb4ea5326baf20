// Kernel calls that are remembered and made again for other tokens: a step's calls without Python between them.
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <stdexcept>
#include <variant>
#include <vector>

#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include "bindings/bindings.h"
#include "bindings/experts_args.h"
#include "division.h"
#include "working_memory.h"

namespace penstock {

namespace {

constexpr int64_t kAlignment = 64;

int64_t size_of(int dtype) { return DType(dtype) == DType::f32 ? 4 : 2; }

struct CopyColumnsArgs {
    const char* x;
    char* out;
    int64_t tokens, bytes, out_bytes;
};

// Has the methods of `Kernels` whose calls it can remember, with the same arguments. Addresses among them that depend
// on the step are of its inputs, or of results of calls before; those of weights and caches stay. A result is a row of
// bytes for each token, and lies in memory of the program's own, which results that are not needed any more give up.
class Program {
public:
    // inputs: (address, bytes) of what a step brings, as they are while calls are remembered, for so many tokens.
    Program(const KernelTable& table, int64_t tokens, const std::vector<std::pair<Address, int64_t>>& inputs)
        : table_(table), recorded_tokens_(tokens), num_inputs_(int(inputs.size())) {
        for (const auto& [address, bytes] : inputs) values_.push_back({address, bytes, 0, -1, -1});
    }

    void rms_norm(Address x, Address residual, Address weight, Address out, int64_t tokens, int64_t size, float eps,
                  int dtype, int num_threads) {
        auto& args = add<RmsNormArgs>({nullptr, nullptr, pointer<void>(weight), nullptr, tokens, size, eps,
                                       DType(dtype), num_threads});
        reads(args.x, x);
        if (residual) reads(args.residual, residual);
        writes(args.out, out, size * size_of(dtype));
        counts(args.tokens);
    }

    void linear(Address x, Address weight, Address bias, Address out, int64_t m, int64_t n, int64_t k, int dtype,
                int out_dtype, int num_threads) {
        auto& args = add<LinearArgs>({nullptr, pointer<void>(weight), pointer<void>(bias), nullptr, m, n, k,
                                      DType(dtype), DType(out_dtype), num_threads});
        reads(args.x, x);
        writes(args.out, out, n * size_of(out_dtype));
        counts(args.m);
    }

    void quantized_linear(const LayoutNumbers& layout, Address x, Address weight, Address bias, Address out, int64_t m,
                          int64_t n, int64_t k, int dtype, int out_dtype, int num_threads, bool is_gated) {
        auto& args = add<QuantizedLinearArgs>({layout_of(layout), nullptr, pointer<void>(weight), pointer<void>(bias),
                                               nullptr, m, n, k, DType(dtype), DType(out_dtype), num_threads, {},
                                               is_gated});
        reads(args.x, x);
        writes(args.out, out, (is_gated ? n / 2 : n) * size_of(out_dtype));
        counts(args.m);
    }

    void rope_and_cache(Address qkv, Address cos, Address sin, Address key_cache, Address value_cache,
                        Address slot_mapping, Address q_norm, Address k_norm, int64_t tokens, int64_t num_heads,
                        int64_t num_kv_heads, int64_t head_dim, float eps, int dtype, int cache_dtype,
                        int num_threads) {
        auto& args = add<RopeArgs>({nullptr, nullptr, nullptr, pointer<void>(key_cache), pointer<void>(value_cache),
                                    nullptr, pointer<void>(q_norm), pointer<void>(k_norm), tokens, num_heads,
                                    num_kv_heads, head_dim, eps, DType(dtype), DType(cache_dtype), num_threads});
        reads(args.qkv, qkv);
        reads(args.cos, cos);
        reads(args.sin, sin);
        reads(args.slot_mapping, slot_mapping);
        counts(args.tokens);
    }

    void paged_attention(Address q, int64_t q_stride, Address key_cache, Address value_cache, Address block_tables,
                         int64_t max_blocks, Address context_lens, Address query_starts, Address out,
                         int64_t num_requests, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, float scale,
                         int64_t sliding_window, int dtype, int cache_dtype, int num_threads) {
        auto& args = add<AttentionArgs>({nullptr, q_stride, pointer<void>(key_cache), pointer<void>(value_cache),
                                         nullptr, max_blocks, nullptr, nullptr, nullptr, num_requests, num_heads,
                                         num_kv_heads, head_dim, scale, sliding_window, DType(dtype),
                                         DType(cache_dtype), num_threads});
        reads(args.q, q);
        reads(args.block_tables, block_tables);
        reads(args.context_lens, context_lens);
        reads(args.query_starts, query_starts);
        writes(args.out, out, num_heads * head_dim * size_of(dtype));
    }

    void silu_and_mul(Address gate_up, Address out, int64_t tokens, int64_t size, int dtype, int num_threads) {
        auto& args = add<SiluAndMulArgs>({nullptr, nullptr, tokens, size, DType(dtype), num_threads});
        reads(args.gate_up, gate_up);
        writes(args.out, out, size * size_of(dtype));
        counts(args.tokens);
    }

    void choose_experts(Address logits, Address experts, Address weights, int64_t tokens, int num_experts, int top_k,
                        bool is_renormalized, int num_threads) {
        auto& args = add<ChooseExpertsArgs>({nullptr, nullptr, nullptr, tokens, num_experts, top_k, is_renormalized,
                                             num_threads});
        reads(args.logits, logits);
        writes(args.experts, experts, top_k * int64_t(sizeof(int32_t)));
        writes(args.weights, weights, top_k * int64_t(sizeof(float)));
        counts(args.tokens);
    }

    void experts_mlp(const LayoutNumbers& gate_up_layout, Address gate_up, const LayoutNumbers& down_layout,
                     Address down, Address x, Address experts, Address weights, Address out, int64_t tokens,
                     int num_experts, int top_k, int64_t hidden, int64_t inner, int dtype, int num_threads) {
        auto& args = add<ExpertsMlpArgs>({nullptr, nullptr, nullptr, nullptr, matrices_of(gate_up_layout, gate_up),
                                          matrices_of(down_layout, down), tokens, num_experts, top_k, hidden, inner,
                                          DType(dtype), num_threads});
        reads(args.x, x);
        reads(args.experts, experts);
        reads(args.weights, weights);
        writes(args.out, out, hidden * size_of(dtype));
        counts(args.tokens);
    }

    void add_shared_expert(Address mixed, Address logits, Address shared, Address out, int64_t tokens, int64_t size,
                           int dtype, int num_threads) {
        auto& args = add<AddSharedArgs>({nullptr, nullptr, nullptr, nullptr, tokens, size, DType(dtype), num_threads});
        reads(args.mixed, mixed);
        reads(args.logits, logits);
        reads(args.shared, shared);
        writes(args.out, out, size * size_of(dtype));
        counts(args.tokens);
    }

    // Rows of `bytes` into columns of a result whose rows are of `out_bytes`: what torch.cat does with each of its parts.
    void copy_columns(Address x, Address out, int64_t tokens, int64_t bytes, int64_t out_bytes) {
        auto& args = add<CopyColumnsArgs>({nullptr, nullptr, tokens, bytes, out_bytes});
        reads(args.x, x);
        writes(args.out, out, out_bytes);
        counts(args.tokens);
    }

    // No more calls are remembered. result: what a run writes where it is told to.
    void finish(Address result) {
        result_ = find(result);
        if (result_ < num_inputs_) throw std::invalid_argument("the result is none of a remembered call");
        std::vector<int> free_slots;
        for (int call = 0; call < int(calls_.size()); ++call) {
            for (int i = num_inputs_; i < int(values_.size()); ++i)
                if (values_[i].first_call == call && i != result_) values_[i].slot = take_slot(free_slots, values_[i]);
            for (int i = num_inputs_; i < int(values_.size()); ++i)
                if (values_[i].last_call == call && i != result_) free_slots.push_back(values_[i].slot);
        }
    }

    void run(const std::vector<Address>& inputs, Address result, int64_t tokens, int64_t num_requests,
             int64_t max_blocks) {
        place(inputs, result, tokens);
        for (int64_t* count : token_counts_) *count = tokens;
        nb::gil_scoped_release released;
        for (Call& call : calls_) {
            if (auto* attention = std::get_if<AttentionArgs>(&call)) {
                attention->num_requests = num_requests;
                attention->max_blocks = max_blocks;
            }
            std::visit([this](const auto& args) { make(args); }, call);
        }
    }

private:
    using Call = std::variant<RmsNormArgs, LinearArgs, QuantizedLinearArgs, RopeArgs, AttentionArgs, SiluAndMulArgs,
                              ChooseExpertsArgs, ExpertsMlpArgs, AddSharedArgs, CopyColumnsArgs>;

    // An input or a result. While calls are remembered it lies at `address`.
    struct Value {
        Address address;
        int64_t bytes, row_bytes;
        int first_call, last_call;
        int slot = -1;
    };
    struct Free {
        void operator()(char* memory) const { free(memory); }
    };
    struct Use {
        void** field;
        int value;
        int64_t offset;
    };

    void make(const RmsNormArgs& args) const { table_.norm.rms_norm(args); }
    void make(const LinearArgs& args) const { table_.linear.linear(args); }
    void make(const QuantizedLinearArgs& args) const { table_.quantized.linear(args); }
    void make(const RopeArgs& args) const { table_.rope.rope_and_cache(args); }
    void make(const AttentionArgs& args) const { table_.attention.paged_attention(args); }
    void make(const SiluAndMulArgs& args) const { table_.activation.silu_and_mul(args); }
    void make(const ChooseExpertsArgs& args) const { table_.experts.choose(args); }
    void make(const ExpertsMlpArgs& args) const { table_.experts.mlp(args); }
    void make(const AddSharedArgs& args) const { table_.experts.add_shared(args); }

    void make(const CopyColumnsArgs& args) const {
        for (int64_t token = 0; token < args.tokens; ++token)
            memcpy(args.out + token * args.out_bytes, args.x + token * args.bytes, size_t(args.bytes));
    }

    template <class Args>
    Args& add(const Args& args) {
        return std::get<Args>(calls_.emplace_back(args));
    }

    int find(Address address) const {
        for (int i = int(values_.size()) - 1; i >= 0; --i)
            if (address >= values_[i].address && address < values_[i].address + Address(values_[i].bytes)) return i;
        return -1;
    }

    template <class T>
    void uses(T*& field, int value, Address address) {
        values_[value].last_call = int(calls_.size()) - 1;
        uses_.push_back({const_cast<void**>(reinterpret_cast<const void* const*>(&field)), value,
                         int64_t(address - values_[value].address)});
    }

    template <class T>
    void reads(T*& field, Address address) {
        const int value = find(address);
        if (value < 0) throw std::invalid_argument("an operand is neither an input nor the result of a remembered call");
        uses(field, value, address);
    }

    // A part of a result that is there already, or the first part of a new one.
    template <class T>
    void writes(T*& field, Address address, int64_t row_bytes) {
        int value = find(address);
        if (value < 0) {
            value = int(values_.size());
            values_.push_back({address, recorded_tokens_ * row_bytes, row_bytes, int(calls_.size()) - 1, -1});
        }
        uses(field, value, address);
    }

    void counts(int64_t& field) {
        if (field != recorded_tokens_) throw std::invalid_argument("a call is not for the tokens of the step");
        token_counts_.push_back(&field);
    }

    int take_slot(std::vector<int>& free_slots, const Value& value) {
        for (size_t i = 0; i < free_slots.size(); ++i) {
            const int slot = free_slots[i];
            if (slot_row_bytes_[slot] != value.row_bytes) continue;
            free_slots.erase(free_slots.begin() + std::ptrdiff_t(i));
            return slot;
        }
        slot_row_bytes_.push_back(value.row_bytes);
        return int(slot_row_bytes_.size()) - 1;
    }

    // Where everything lies in this run, into the calls.
    void place(const std::vector<Address>& inputs, Address result, int64_t tokens) {
        std::vector<int64_t> slot_offsets;
        int64_t total = 0;
        for (const int64_t row_bytes : slot_row_bytes_) {
            slot_offsets.push_back(total);
            total += round_up(tokens * row_bytes, kAlignment);
        }
        if (total > capacity_) {
            memory_.reset();
            capacity_ = 0;
            memory_.reset(static_cast<char*>(allocate_working_memory(size_t(total))));
            capacity_ = total;
        }
        for (const Use& use : uses_) {
            const bool is_input = use.value < num_inputs_;
            *use.field = is_input               ? pointer<char>(inputs[size_t(use.value)]) + use.offset
                         : use.value == result_ ? pointer<char>(result) + use.offset
                                                : memory_.get() + slot_offsets[size_t(values_[use.value].slot)] + use.offset;
        }
    }

    const KernelTable& table_;
    const int64_t recorded_tokens_;
    const int num_inputs_;
    std::deque<Call> calls_;  // stays where it is while it grows
    std::vector<Value> values_;
    std::vector<Use> uses_;
    std::vector<int64_t*> token_counts_;
    std::vector<int64_t> slot_row_bytes_;
    int result_ = -1;
    std::unique_ptr<char, Free> memory_;
    int64_t capacity_ = 0;
};

}  // namespace

void bind_program(nb::module_& m) {
    nb::class_<Program>(m, "Program")
        .def(nb::init<const KernelTable&, int64_t, const std::vector<std::pair<Address, int64_t>>&>(),
             nb::keep_alive<1, 2>())
        .def("rms_norm", &Program::rms_norm)
        .def("linear", &Program::linear)
        .def("quantized_linear", &Program::quantized_linear)
        .def("rope_and_cache", &Program::rope_and_cache)
        .def("paged_attention", &Program::paged_attention)
        .def("silu_and_mul", &Program::silu_and_mul)
        .def("choose_experts", &Program::choose_experts)
        .def("experts_mlp", &Program::experts_mlp)
        .def("add_shared_expert", &Program::add_shared_expert)
        .def("copy_columns", &Program::copy_columns)
        .def("finish", &Program::finish)
        .def("run", &Program::run);
}

}  // namespace penstock
