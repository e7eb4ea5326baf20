// The products of a linear layer: one, or that of each group of rows. They are multiplied one after another, and threads
// draw the panels of each until none is left; who finds none goes on to the next product, so that nobody waits between
// them, both the groups and the columns are shared, and each weight is read once.
#pragma once

#include <new>

#include "ops/row_groups.h"
#include "scratch.h"

namespace penstock::PENSTOCK_ISA {

// Rows of the output.
template <class Args>
int64_t output_rows(const Args& args) {
    if (args.groups.first == nullptr) return args.m;
    int64_t rows = 0;
    for (int64_t i = 0; i < args.groups.count; ++i) rows += args.groups.first[i].rows;
    return rows;
}

// Rows of a product, on average.
template <class Args>
int64_t rows_of_a_product(const Args& args) {
    return args.groups.count > 1 ? output_rows(args) / args.groups.count : output_rows(args);
}

// Job: made of (const Args&, threads), which it may refer to; run(x) draws panels in any thread.
template <class Job, class Args>
class Products {
public:
    Products(const Args& args, int threads) : count_(args.groups.first ? args.groups.count : 1) {
        static thread_local Scratch<Product> scratch;
        products_ = scratch.at_least(count_);
        for (int64_t i = 0; i < count_; ++i) {
            const RowGroup all = {args.weight, 0, 0, args.m};
            new (&products_[i]) Product(args, args.groups.first ? args.groups.first[i] : all, threads);
        }
    }

    // What each thread does. x_from(row): what a job reads instead of args.x, from that row of x on.
    template <class XFrom>
    void run(const XFrom& x_from) {
        for (int64_t i = 0; i < count_; ++i) products_[i].job.run(x_from(products_[i].x_row));
    }

private:
    struct Product {
        Args args;
        int64_t x_row;
        Job job;

        Product(const Args& all, const RowGroup& group, int threads)
            : args(of_group(all, group)), x_row(group.x_row), job(args, threads) {}
        Product(const Product&) = delete;

        static Args of_group(const Args& all, const RowGroup& group) {
            Args args = all;
            args.groups = {};
            args.weight = group.weight;
            args.m = group.rows;
            args.out = static_cast<char*>(all.out) + group.out_row * all.n * size_of(all.out_dtype);
            return args;
        }
    };

    const int64_t count_;
    Product* products_;
};

}  // namespace penstock::PENSTOCK_ISA
