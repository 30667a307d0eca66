// Prints, as JSON, where CuTe says that each lane's elements of the fragments lie: for test_emulator.py to compare.
#include <cute/tensor.hpp>
// After the above, without which they do not compile
#include <cstdio>
#include <cute/atom/copy_atom.hpp>
#include <cute/atom/mma_atom.hpp>
#include <string>

using namespace cute;

namespace {

bool first = true;

void begin(const char* name) {
  std::printf("%s\"%s\": [", first ? "{" : ",\n", name);
  first = false;
}

// [lane][element] -> position in the matrix, counted along its rows' index first
template <class Layout>
void print(const char* name, Layout layout, int elements, int step = 1) {
  begin(name);
  for (int lane = 0; lane < 32; ++lane) {
    std::printf("%s[", lane ? ", " : "");
    for (int i = 0; i < elements; ++i) std::printf("%s%d", i ? ", " : "", static_cast<int>(layout(lane, i * step)));
    std::printf("]");
  }
  std::printf("]");
}

template <class Op>
void print_mma(const char* name, int a, int b) {
  using Traits = MMA_Traits<Op>;
  print((std::string(name) + " a").c_str(), typename Traits::ALayout{}, a);
  print((std::string(name) + " b").c_str(), typename Traits::BLayout{}, b);
  print((std::string(name) + " d").c_str(), typename Traits::CLayout{}, 4);
}

// Of ldmatrix the layouts count bits. The source: eight elements for each lane that gives an address.
template <class Op>
void print_ldmatrix(const char* name, int matrices) {
  using Traits = Copy_Traits<Op>;
  print((std::string(name) + " source").c_str(), typename Traits::SrcLayout{}, 8, 16);
  print((std::string(name) + " destination").c_str(), typename Traits::DstLayout{}, 2 * matrices, 16);
}

}  // namespace

int main() {
  print_mma<SM80_16x8x16_F32F16F16F32_TN>("mma_m16n8k16<Half>", 8, 4);
  print_mma<SM80_16x8x16_F32BF16BF16F32_TN>("mma_m16n8k16<BFloat16>", 8, 4);
  print_mma<SM80_16x8x8_F32TF32TF32F32_TN>("mma_m16n8k8_tf32", 4, 2);
  print_ldmatrix<SM75_U32x2_LDSM_N>("ldmatrix_x2", 2);
  print_ldmatrix<SM75_U32x4_LDSM_N>("ldmatrix_x4", 4);
  print_ldmatrix<SM75_U16x4_LDSM_T>("ldmatrix_x2_trans", 2);
  print_ldmatrix<SM75_U16x8_LDSM_T>("ldmatrix_x4_trans", 4);
  std::printf("}\n");
}
