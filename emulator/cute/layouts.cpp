// Prints, as JSON, where CuTe says that each lane's elements of the fragments lie, and how operands of products
// lie in shared memory: for test_conformance.py to compare.
#include <cstddef>
// What stands for shared memory here, and what CuTe takes for an address in it
const void* shared_memory = nullptr;
inline size_t __cvta_generic_to_shared(const void* pointer) {
  return static_cast<const char*>(pointer) - static_cast<const char*>(shared_memory);
}
#define CUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED 1
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
void print(const char* name, Layout layout, int elements, int step = 1, int lanes = 32) {
  begin(name);
  for (int lane = 0; lane < lanes; ++lane) {
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

// Of ldmatrix and stmatrix the layouts count bits. Of shared memory: eight elements for each lane that gives an
// address.
template <class Op>
void print_ldmatrix(const char* name, int matrices) {
  using Traits = Copy_Traits<Op>;
  print((std::string(name) + " source").c_str(), typename Traits::SrcLayout{}, 8, 16);
  print((std::string(name) + " destination").c_str(), typename Traits::DstLayout{}, 2 * matrices, 16);
}

template <class Op>
void print_stmatrix(const char* name) {
  using Traits = Copy_Traits<Op>;
  print((std::string(name) + " source").c_str(), typename Traits::SrcLayout{}, 8, 16);
  print((std::string(name) + " destination").c_str(), typename Traits::DstLayout{}, 8, 16);
}

// [row or column][depth] -> the element of shared memory; and what wgmma takes for the first and for the third 16
// places of the depth, from the start of either
template <GMMA::Major kMajor, class Layout>
void print_operand(const char* name, Layout layout) {
  print(name, as_position_independent_swizzle_layout(layout), 64, 1, int{size<0>(layout)});
  alignas(1024) static half_t memory[cosize_v<Layout>];
  shared_memory = memory;
  const Tensor all = make_tensor(make_smem_ptr(memory), layout);
  begin((std::string(name) + " descriptors").c_str());
  for (int step : {0, 2}) {
    const auto some = local_tile(all, make_shape(size<0>(layout), Int<16>{}), make_coord(0, step));
    const uint64_t descriptor = SM90::GMMA::make_gmma_desc<kMajor>(some);
    std::printf("%s%llu", step ? ", " : "", static_cast<unsigned long long>(descriptor));
  }
  std::printf("]");
}

template <int kN>
void print_wgmma() {
  print(("wgmma " + std::to_string(kN) + " d").c_str(), SM90::GMMA::CLayout_64xN<kN>{}, kN / 2, 1, 128);
  const auto shape = make_shape(Int<kN>{}, Int<64>{});
  print_operand<GMMA::Major::K>(("wgmma " + std::to_string(kN) + " by depth").c_str(),
                                tile_to_shape(GMMA::Layout_K_SW128_Atom<half_t>{}, shape));
  // The depth first: the next 64 rows or columns lie behind all of it.
  print_operand<GMMA::Major::MN>(("wgmma " + std::to_string(kN) + " by extent").c_str(),
                                 tile_to_shape(GMMA::Layout_MN_SW128_Atom<half_t>{}, shape, Step<_2, _1>{}));
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
  print_stmatrix<SM90_U32x4_STSM_N>("stmatrix_x4");
  print_stmatrix<SM90_U16x8_STSM_T>("stmatrix_x4_trans");
  print_wgmma<64>();
  print_wgmma<128>();
  print_wgmma<192>();
  print_wgmma<256>();
  std::printf("}\n");
}
