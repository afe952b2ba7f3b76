// The pieces of a text that the gate reads one by one, so that harmless words around a request do not drown it. The C++
// side of runtime/pieces.py, which says what they are.
#pragma once

#include <algorithm>
#include <cstddef>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "regex.hpp"

namespace autosteer {

constexpr size_t kFewestWords = 3;         // of a piece, if the text has so many
constexpr size_t kWindow = 10, kStride = 5;  // words that are read at once, and from one window to the next

/// ASCII white space.
inline bool is_space(char c) {
  return c == ' ' || ('\t' <= c && c <= '\r');
}

/// The words of a text, which stand between ASCII white space.
inline std::vector<Span> words_in(std::string_view text) {
  std::vector<Span> words;
  for (size_t at = 0; at < text.size(); ++at) {
    if (is_space(text[at])) continue;
    const size_t begin = at;
    while (at < text.size() && !is_space(text[at])) ++at;
    words.emplace_back(begin, at);
  }
  return words;
}

/// What `ends` cuts `text` into; a part of fewer than kFewestWords words is joined with what follows it, at the end
/// with what comes before.
inline std::vector<std::string_view> parts_of(std::string_view text, const Regex& ends) {
  const std::vector<Span> words = words_in(text);
  std::vector<size_t> cuts = {0};
  size_t first = 0;  // the first word of the part
  for (size_t end = 0; end < text.size();) {
    end = ends.find(text, end)->second;
    const auto next = std::lower_bound(words.begin(), words.end(), Span{end, 0});  // the first that begins behind it
    const auto behind = static_cast<size_t>(next - words.begin());
    if (behind - first < kFewestWords) continue;
    cuts.push_back(end);
    first = behind - (words[behind - 1].second > end ? 1 : 0);  // a word that is cut counts twice
  }
  if (cuts.size() > 1) cuts.pop_back();
  cuts.push_back(text.size());
  std::vector<std::string_view> parts;
  for (size_t i = 1; i < cuts.size(); ++i) parts.push_back(text.substr(cuts[i - 1], cuts[i] - cuts[i - 1]));
  return parts;
}

/// The pieces of `text`, in order, without repetition; none if it is the only one.
inline std::vector<std::string> pieces(std::string_view text) {
  static const Regex sentences("[^.?!;\n\u2026\u3002\uff01\uff1b\uff1f]*[.?!;\n\u2026\u3002\uff01\uff1b\uff1f]*");
  static const Regex clauses("[^,:/|\u2013\u2014\u3001\uff0c\uff1a]*[,:/|\u2013\u2014\u3001\uff0c\uff1a]*");
  std::vector<std::string> found;
  std::set<std::string_view> known;
  const auto add_windows = [&](std::string_view part) {
    const std::vector<Span> words = words_in(part);
    if (words.empty()) return;
    const size_t last = words.size() > kWindow ? words.size() - kWindow : 0;
    for (size_t first = 0;; first = std::min(first + kStride, last)) {
      const size_t begin = words[first].first, end = words[std::min(first + kWindow, words.size()) - 1].second;
      const std::string_view window = part.substr(begin, end - begin);
      if (known.insert(window).second) found.emplace_back(window);
      if (first == last) break;
    }
  };
  for (const std::string_view sentence : parts_of(text, sentences)) {
    add_windows(sentence);
    if (words_in(sentence).size() <= kWindow) continue;
    for (const std::string_view clause : parts_of(sentence, clauses)) add_windows(clause);
  }
  const std::vector<Span> words = words_in(text);
  const bool whole = found.size() == 1 && found[0].size() == words.back().second - words.front().first;
  return whole ? std::vector<std::string>() : found;
}

}  // namespace autosteer
