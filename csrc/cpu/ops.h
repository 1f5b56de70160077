// What every instruction set's compilation defines; rtk.h says what each op does.
#pragma once

#include "rtk.h"

namespace rtk::RTK_ISA {

void pgd_step(const PgdStep&, int threads);
void pgd_init(const PgdInit&, int threads);
void topk_mask(const TopkMask&, int threads);
void prepare_weight(const PrepareWeight&, int threads);
void block_matmul(const BlockMatmul&, const float* x, float* out, int threads);
void block_matmul_bwd_input(const BlockMatmul&, const float* grad, float* out, int threads);
void block_matmul_bwd_weight(const BlockMatmul&, const float* grad, const float* x, float* dw, float* dmask,
                             int threads);

}  // namespace rtk::RTK_ISA
