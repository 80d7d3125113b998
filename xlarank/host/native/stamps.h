// A row that is written while others read it: seqlocks (Boehm, "Can seqlocks get along with programming
// language memory models?", MSPC 2012), one for many rows.
//
// A stamp is odd while a row of its share is being written and goes up by two with every write. Whoever reads
// rows adds up their stamps before and after: stamps never fall, so equal sums mean that no row changed in
// between. Readers write nothing and wait only for a copy of one row, giving their core away if the writer has
// none. The built-ins stand for std::atomic, whose inline functions the instruction sets' files may not use.
#pragma once

#include <cstdint>

namespace xlarank {

// 16 KB a table: in the first-level cache of who reads many rows, and 4096 writes apart from each other.
constexpr int kStampBits = 12;
constexpr int64_t kNumStamps = int64_t{1} << kStampBits;

inline __attribute__((always_inline)) uint32_t stamp_of(int32_t row) {
  return static_cast<uint32_t>(row) * 2654435761u >> (32 - kStampBits);
}

// The stamp once no row of its share is being written: after some looks the core goes to whoever may need it to
// finish. In a file of its own, because the library's functions are none of an instruction set's.
uint32_t wait_until_written(const uint32_t* stamp);

// Sum of the stamps of rows, once none of them is being written. Rows below 0 have none.
inline __attribute__((always_inline)) uint64_t stamps_before(const uint32_t* stamps, const int32_t* rows,
                                                             int64_t num_rows) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < num_rows; ++i) {
    if (rows[i] < 0) continue;
    const uint32_t* const at = stamps + stamp_of(rows[i]);
    uint32_t stamp = __atomic_load_n(at, __ATOMIC_ACQUIRE);
    if (stamp & 1) stamp = wait_until_written(at);
    sum += stamp;
  }
  return sum;
}

// The same after the rows were read; a write that has begun since then makes it differ.
inline __attribute__((always_inline)) uint64_t stamps_after(const uint32_t* stamps, const int32_t* rows,
                                                            int64_t num_rows) {
  __atomic_thread_fence(__ATOMIC_ACQUIRE);
  uint64_t sum = 0;
  for (int64_t i = 0; i < num_rows; ++i) {
    if (rows[i] >= 0) sum += __atomic_load_n(stamps + stamp_of(rows[i]), __ATOMIC_RELAXED);
  }
  return sum;
}

// Writes one row. One writer a table at a time.
inline void write_row(uint32_t* stamps, int32_t row, uint8_t* to, const uint8_t* from, int64_t row_bytes) {
  uint32_t* const at = stamps + stamp_of(row);
  const uint32_t stamp = __atomic_load_n(at, __ATOMIC_RELAXED);
  __atomic_store_n(at, stamp + 1, __ATOMIC_RELAXED);
  __atomic_thread_fence(__ATOMIC_RELEASE);
  __builtin_memcpy(to, from, static_cast<unsigned long>(row_bytes));
  __atomic_store_n(at, stamp + 2, __ATOMIC_RELEASE);
}

// The same for rows that several processes share, any of which may be killed in between: what is being written
// stands in the journal until it is. [8 + row_bytes]: the row's number + 1 as int64, 0 for none, and its bytes.
// Whoever finds a number there, and no writer, writes the row again (xlarank.host.shared_rows).
inline void write_row_for_all(uint32_t* stamps, int32_t row, uint8_t* to, const uint8_t* from, int64_t row_bytes,
                              uint8_t* journal) {
  int64_t* const number = reinterpret_cast<int64_t*>(journal);
  __builtin_memcpy(journal + sizeof(int64_t), from, static_cast<unsigned long>(row_bytes));
  __atomic_store_n(number, int64_t{row} + 1, __ATOMIC_RELEASE);
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  write_row(stamps, row, to, from, row_bytes);
  __atomic_store_n(number, 0, __ATOMIC_RELEASE);
}

}  // namespace xlarank
