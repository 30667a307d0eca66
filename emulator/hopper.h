// What a block has besides that uses instructions of sm_90a: a race checker for threads that wait for each other in
// more ways than epochs and warps express (block_clocks.cpp), mbarriers and named barriers (block_mbarrier.cpp), boxes
// of tensors under way (block_tma.cpp), products of warpgroups under way (block_wgmma.cpp), clusters
// (block_cluster.cpp).
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "block.h"
#include "tensor_map.h"

namespace fastconv::emulator {

using Clock = uint32_t;

// What threads did with two bytes of shared memory since a box last came there
struct Element {
  enum State : uint8_t { kUnwritten, kWritten, kInFlight, kBarrier };
  // By lanes of one warp, at this time of theirs or later
  struct Reads {
    uint32_t lanes = 0;
    Clock clock = 0;
    uint8_t warp = 0;
  };
  Clock write_clock = 0;
  uint16_t writer = 0;
  State state = kUnwritten;
  Reads reads[2];
};

// Boxes that came to 16 bytes, and what read them that is no thread
struct Chunk {
  static constexpr int kMostReaders = 16;
  Clock phase = 0;  // of `barrier`: the box has come when so many have ended; 0 where none was to come
  uint16_t barrier = 0;
  bool in_flight = false;
  bool touched = false;  // threads did something with its elements since
  uint16_t readers = 0;  // a bit for each
  Clock reads[kMostReaders]{};
};

// A barrier in shared memory. The box that it waits for in a phase is known to whom knows that the phase has ended.
struct Mbarrier {
  uint32_t offset;
  uint32_t agent;
  int arrivals, pending;
  int64_t bytes = 0;                 // that are expected and have not come; less than 0: that were not expected yet
  Clock first_phase = 0, phase = 0;  // how many have ended; an even number more after another initialisation
  bool fenced = false;
  uint32_t initialiser;
  Clock initialised;
  Place place;
  std::vector<Clock> gathering, released;  // what those know that arrived in this phase, and in the last one
  std::vector<uint16_t> waiting;
  Clock box_phase = 0, waited = 0;  // the last that has boxes, the last that a thread has waited for
};

struct NamedBarrier {
  int threads = 0;
  std::vector<Clock> gathering;
  std::vector<uint16_t> waiting;
};

struct Box {
  TensorMapFields map;
  BoxPosition position;
  uint32_t address;  // in the shared window
  uint32_t begin;    // of the block's shared memory
  uint32_t bytes;
  uint32_t barrier;  // number, of a load
  uint16_t thread;   // that issued it
  Place place;
};

// A thread that stores boxes
struct Storer {
  uint32_t agent, reader;
  std::vector<Box> open;
  std::deque<std::vector<Box>> groups;  // that were committed and have not been read
  Clock committed = 0;
};

// Registers of a warpgroup while products add to them: 64 rows
struct Accumulators {
  float* of[128];
  int columns = 0;
  int pending = 0;  // products
  std::vector<float> sums;
  Place place;
};

struct Product {
  WarpgroupProduct what;
  Accumulators* accumulators;
  Place place;
};

struct Warpgroup {
  const char* op = nullptr;  // null: no thread waits in a collective
  Place place;
  int arrived = 0;
  WarpgroupProduct from[128];
  bool fenced = false;
  uint32_t agent = 0, reader = 0;
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;  // that were committed and are not done
  Clock committed = 0;
  std::vector<std::unique_ptr<Accumulators>> accumulators;  // in use while products are pending
  std::vector<Clock> known;                                 // by all its threads, at least
  int registers = 0;
  int registers_wanted = 0;       // while it waits for them
  std::vector<uint16_t> waiting;  // for them
};

// An arrival at a barrier of another block
struct RemoteArrival {
  Clock clock;
  uint32_t barrier;
  Place place;
};

// What each block of a cluster has for itself
struct HopperMember {
  NamedBarrier named[16];
  std::vector<uint32_t> readers;  // agents
  int free_registers = 0;
  std::map<uint16_t, RemoteArrival> arrivals;  // the last of each thread of other blocks
};

class Hopper {
 public:
  explicit Hopper(Block& block) : block_(block) {}

  // Once in each block that uses it, at any time
  void begin();
  // What is left undone: by a thread that ends; by the block
  void check_end(const Fiber& fiber);
  void check_end();
  void check_others(uint32_t rank);
  // Boxes come when they like, but before nothing can go on without them.
  void land_some();
  // What a thread waits for that is stuck; "" where there is no more to say
  std::string waits_for(const Fiber& fiber) const;

  // ---- clocks and the shadow of shared memory
  void sync_block();
  void sync_lanes(int warp, uint32_t mask);
  void read(const Fiber& fiber, uint32_t offset, uint32_t bytes, const Place& place);
  void read_by_warp(uint32_t offset, uint32_t bytes, const Place& place);
  void write(const Fiber& fiber, uint32_t offset, uint32_t bytes, bool asynchronous, const Place& place);
  void landed(const Fiber& fiber, uint32_t offset, uint32_t bytes);
  Clock now(uint32_t thread) const { return known(thread)[thread]; }
  bool knows(uint32_t thread, uint32_t other, Clock clock) const { return known(thread)[other] >= clock; }

  // ---- barriers
  void mbarrier_init(uint32_t barrier, int arrivals, const Place& place);
  void mbarrier_init_fence();
  void mbarrier_arrive(uint32_t barrier, uint32_t expected_bytes, const Place& place);
  void mbarrier_arrive_at(uint32_t barrier, uint32_t rank, const Place& place);
  void mbarrier_wait(uint32_t barrier, uint32_t parity, const Place& place);
  void named_barrier_sync(int number, int threads, const Place& place);
  void fence_proxy_async();
  void set_registers(int count, bool more, const Place& place);
  void cluster_sync(const Place& place);
  // Once all threads are there that have not ended
  void end_cluster_sync();

  // ---- boxes
  void tma_prefetch(const unsigned char* map, const Place& place);
  // To the blocks of a mask
  void tma_load(uint32_t destination, const unsigned char* map, uint32_t barrier, uint32_t blocks, int rank,
                bool im2col, const BoxPosition& position, const Place& place);
  void tma_store(const unsigned char* map, uint32_t source, int rank, const BoxPosition& position, const Place& place);
  void tma_store_commit();
  void tma_store_wait(size_t pending);

  // ---- products
  void wgmma_fence(const Place& place);
  void wgmma(const WarpgroupProduct& product, const Place& place);
  void wgmma_commit(const Place& place);
  void wgmma_wait(size_t pending, const Place& place);

 private:
  static constexpr uint32_t kMostAgents = 64;  // of a block

  Clock* known(uint32_t thread) { return &clocks_[size_t{thread} * columns_]; }
  const Clock* known(uint32_t thread) const { return &clocks_[size_t{thread} * columns_]; }
  void join(Clock* clocks, const Clock* more) const;
  void meet(const std::vector<uint16_t>& threads);
  uint32_t add_agent(const std::string& name, const Place& place);
  uint32_t add_reader(const std::string& name, const Place& place);
  Clock known_by_all(Warpgroup& group, uint32_t other, Clock wanted);

  static constexpr uint32_t kNobody = ~0u;
  std::string whose(uint32_t column) const;
  void say(const char* kind, const Place& place, const char* access, uint32_t by, uint32_t element, const char* what,
           uint32_t other = kNobody);
  uint32_t unknown_reader(const Element::Reads& reads, uint32_t thread) const;
  void check_chunk(uint32_t chunk, uint32_t thread, const char* access, const Place& place);
  void check_write(uint32_t element, uint32_t thread, const char* access, const Place& place);
  template <class Known>
  void check_read(uint32_t element, uint32_t by, const Place& place, Known&& known);
  template <class Known>
  void check_fence(uint32_t element, uint32_t by, const char* access, const Place& place, Known&& known);
  void note_read(Element& element, const Fiber& fiber);
  Clock fence_after(uint32_t writer, Clock write) const;
  // What is no thread reads and writes 16 bytes: in the name of a thread, or of all threads of a warpgroup.
  struct Reader {
    uint32_t number;
    Clock clock;
    uint32_t thread;
    Warpgroup* group;  // null for a thread
    Place place;
  };
  void read_chunk(uint32_t offset, const Reader& reader);
  void write_chunk(uint32_t offset, const Mbarrier& barrier, const Place& place);

  Mbarrier& mbarrier(uint32_t address, uint32_t rank, const char* op, bool asynchronous, const Place& place);
  void arrive(Mbarrier& barrier, uint32_t expected_bytes, const Place& place);
  void end_phase(Mbarrier& barrier);
  void check_member(uint32_t rank, const char* op, const Place& place);
  HopperMember& own() { return members_[block_.self_->rank]; }

  Box box(const unsigned char* map, uint32_t address, int rank, bool im2col, const BoxPosition& position,
          const char* op, const Place& place);
  void land(const Box& box);
  void read_stored(const Box& box);

  bool in_warpgroup(const Fiber& fiber) const {
    return fiber.id % block_.thread_pitch_ / 128 < block_.block_threads_ / 128;
  }
  Warpgroup& group() { return groups_[block_.self_->id / 128]; }
  void collective(const char* op, const WarpgroupProduct& mine, const Place& place,
                  const std::function<void(Warpgroup&)>& run);
  Accumulators& take_accumulators(Warpgroup& group, const Place& place);
  void multiply(const Product& product);
  void give_back(Accumulators& accumulators);
  void hand_out_registers();

  const std::string& describe(const Mbarrier& barrier) const { return agents_[barrier.agent - threads_]; }

  Block& block_;
  uint32_t threads_ = 0, columns_ = 0;
  std::vector<Clock> clocks_;               // [thread][thread, or agent]: the time of it that the thread knows of
  std::vector<std::string> agents_;         // those that are no threads: barriers, by phases; readers, by groups
  std::vector<std::vector<Clock>> fences_;  // of each thread, when it called fence_proxy_async
  std::vector<Element> elements_;
  std::vector<Chunk> chunks_;

  std::vector<Mbarrier> barriers_;
  std::vector<int16_t> barrier_at_;  // by 8 bytes of shared memory; -1 where there is none
  std::vector<HopperMember> members_;
  std::vector<uint16_t> at_cluster_barrier_;
  std::vector<int> waits_for_;  // of each thread: parity + 2 * barrier, -1 where it waits for none

  std::vector<Box> loads_;
  int eager_ = 0;
  std::vector<int> storer_of_;  // of each thread, -1 for none
  std::vector<Storer> storers_;

  std::vector<Warpgroup> groups_;
};

}  // namespace fastconv::emulator
