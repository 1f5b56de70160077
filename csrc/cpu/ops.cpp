#include "cpu/ops.h"

namespace rtk::RTK_ISA {

extern const CpuOps ops = {pgd_step,       pgd_init,
                           topk_mask,      prepare_weight,
                           block_matmul,   block_matmul_bwd_input,
                           block_matmul_bwd_weight};

}  // namespace rtk::RTK_ISA
