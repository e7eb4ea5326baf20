// Packing of linear weights and the embedding out of packed ones: see LinearKernels in linear.h.
#pragma once

#include "ops/linear.h"

namespace penstock::PENSTOCK_ISA {

void pack(const PackArgs& args);
void embedding(const EmbeddingArgs& args);

}  // namespace penstock::PENSTOCK_ISA
