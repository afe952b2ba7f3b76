// Regular expressions over UTF-8.
#pragma once

#include <oniguruma.h>

#include <cstddef>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "errors.hpp"

namespace autosteer {

/// A range of bytes of a text: first, one past the last.
using Span = std::pair<size_t, size_t>;

/// A regular expression of Oniguruma over UTF-8.
class Regex {
 public:
  explicit Regex(const std::string& pattern) {
    static std::once_flag once;
    std::call_once(once, [] {
      OnigEncoding encodings[] = {ONIG_ENCODING_UTF8};
      onig_initialize(encodings, 1);
    });
    const auto* begin = reinterpret_cast<const OnigUChar*>(pattern.data());
    OnigErrorInfo info;
    regex_t* regex = nullptr;
    const int status = onig_new(&regex, begin, begin + pattern.size(), ONIG_OPTION_NONE, ONIG_ENCODING_UTF8,
                                ONIG_SYNTAX_DEFAULT, &info);
    regex_.reset(regex);
    if (status != ONIG_NORMAL) throw PackageError("pattern '" + pattern + "' is not a regular expression");
  }

  /// The first match in `text` at or after `from`, if any.
  std::optional<Span> find(std::string_view text, size_t from) const {
    const std::unique_ptr<OnigRegion, void (*)(OnigRegion*)> region(onig_region_new(),
                                                                    [](OnigRegion* r) { onig_region_free(r, 1); });
    const auto* begin = reinterpret_cast<const OnigUChar*>(text.data());
    const auto* end = begin + text.size();
    const auto at = onig_search(regex_.get(), begin, end, begin + from, end, region.get(), ONIG_OPTION_NONE);
    if (at == ONIG_MISMATCH) return std::nullopt;
    if (at < 0) throw InputError("the prompt is too much for the tokenizer's regular expression");
    return Span{static_cast<size_t>(region->beg[0]), static_cast<size_t>(region->end[0])};
  }

  /// All matches in `text`, none within another.
  std::vector<Span> find_all(std::string_view text) const {
    std::vector<Span> found;
    for (auto match = find(text, 0); match; match = find(text, match->second)) found.push_back(*match);
    return found;
  }

 private:
  struct Free {
    void operator()(regex_t* regex) const { onig_free(regex); }
  };
  std::unique_ptr<regex_t, Free> regex_;
};

}  // namespace autosteer
