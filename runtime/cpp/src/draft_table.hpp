// What a model tends to say next: the C++ side of runtime/draft_table.py. A package may have a table of n-grams of its
// own answers (`drafts` in the manifest), from which drafting.hpp drafts free text. A wrong entry costs time and
// changes no answer.
//
// The file: for N n-grams their keys (uint64, ascending), their next tokens (int32) and chances (uint8, 255ths), each N
// numbers, little-endian.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <optional>
#include <string>
#include <vector>

#include "errors.hpp"

namespace autosteer {

/// A token that may follow, and how likely it does.
struct Expected {
  int64_t token;
  double chance;
};

class DraftTable {
 public:
  static constexpr size_t kLongest = 4;  // tokens of an n-gram
  static constexpr int64_t kEntryBytes = 8 + 4 + 1;

  /// Read a file whose size, `count` entries, and hash the manifest has vouched for. Throws PackageError if its
  /// contents are none.
  DraftTable(const std::filesystem::path& file, size_t count, int64_t vocab_size)
      : ngrams_(count), tokens_(count), chances_(count) {
    std::ifstream in(file, std::ios::binary);
    read(in, ngrams_);
    read(in, tokens_);
    read(in, chances_);
    if (!in) throw PackageError(file.string() + ": not readable; copy the package again");
    const auto wrong = [&](const std::string& what) {
      return PackageError(file.string() + ": " + what + "; make it again with autosteer-draft");
    };
    const auto is_above = [](uint64_t one, uint64_t next) { return one >= next; };
    if (std::adjacent_find(ngrams_.begin(), ngrams_.end(), is_above) != ngrams_.end()) {
      throw wrong("the n-grams are not in order");
    }
    const auto is_outside = [&](int32_t token) { return token < 0 || token >= vocab_size; };
    if (std::any_of(tokens_.begin(), tokens_.end(), is_outside)) throw wrong("a token outside the vocabulary");
  }

  /// The token that follows the longest known n-gram at the end of `text` and `draft`, and its chance.
  std::optional<Expected> next(const std::vector<int64_t>& text, const std::vector<int64_t>& draft) const {
    std::array<uint64_t, kLongest> keys{};
    size_t known = std::min(kLongest, text.size() + draft.size());
    uint64_t key = 0x9E3779B97F4A7C15U;
    for (size_t back = 0; back < known; ++back) {  // the shortest n-gram first
      const int64_t token =
          back < draft.size() ? draft[draft.size() - 1 - back] : text[text.size() - 1 - (back - draft.size())];
      key = (key ^ static_cast<uint64_t>(token)) * 0xD6E8FEB86659FD93U;
      key ^= key >> 32;
      keys[back] = key;
    }
    while (known > 0) {
      const auto place = std::lower_bound(ngrams_.begin(), ngrams_.end(), keys[--known]);
      if (place == ngrams_.end() || *place != keys[known]) continue;
      const auto at = static_cast<size_t>(place - ngrams_.begin());
      return Expected{tokens_[at], chances_[at] / 255.0};
    }
    return std::nullopt;
  }

 private:
  template <class Number>
  static void read(std::ifstream& in, std::vector<Number>& numbers) {
    in.read(reinterpret_cast<char*>(numbers.data()), static_cast<std::streamsize>(numbers.size() * sizeof(Number)));
  }

  std::vector<uint64_t> ngrams_;
  std::vector<int32_t> tokens_;
  std::vector<uint8_t> chances_;
};

}  // namespace autosteer
