// The pieces of a text that the gate reads one by one, so that harmless words around a request do not drown it. The C++
// side of runtime/pieces.py, which says what they are.
#pragma once

#include <algorithm>
#include <cstddef>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "gate.hpp"
#include "regex.hpp"

namespace autosteer {

constexpr size_t kFewestWords = 3;           // of a piece, if the text has so many
constexpr size_t kShort = 5;                 // words; a sentence of fewer is a fragment
constexpr size_t kOpening = 3;               // words of a sentence in front of later clauses and fragments
constexpr size_t kWindow = 10, kStride = 5;  // words that are read at once, and from one window to the next
constexpr double kPiecesOfATurn = 8.0;       // about as many as a turn of several sentences has; one is unsafe, if any

/// What the prober's p_unsafe of a piece counts in its turn: its odds are divided by kPiecesOfATurn. What is no
/// probability stays what it is.
inline double weighed(double p_unsafe) {
  return is_safe(p_unsafe, 1.0) ? p_unsafe / (p_unsafe + kPiecesOfATurn * (1.0 - p_unsafe)) : p_unsafe;
}

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

/// The parts of `text` with what is `between` them left out, or with `marks` kept at the end of the part before. A part
/// of fewer than kFewestWords words is joined with what follows, at the end with what comes before.
inline std::vector<std::string_view> parts_of(std::string_view text, const Regex& between, bool marks) {
  const std::vector<Span> words = words_in(text);
  const auto words_before = [&](size_t place) {
    return static_cast<size_t>(std::lower_bound(words.begin(), words.end(), Span{place, 0}) - words.begin());
  };
  std::vector<Span> cuts = {{0, 0}};  // where a part ends, and the next begins
  size_t first = 0;                   // word of the part
  for (auto found = between.find(text, 0); found; found = between.find(text, found->second)) {
    const auto [gap, begin] = *found;
    const size_t end = marks ? begin : gap;
    if (words_before(end) < first + kFewestWords) continue;
    cuts.emplace_back(end, begin);
    first = words_before(begin);
    if (words[first - 1].second > begin) --first;  // a word that is cut counts twice
  }
  if (words.size() < first + kFewestWords && cuts.size() > 1) cuts.pop_back();
  cuts.emplace_back(text.size(), text.size());
  std::vector<std::string_view> parts;
  for (size_t i = 1; i < cuts.size(); ++i) {
    parts.push_back(text.substr(cuts[i - 1].second, cuts[i].first - cuts[i - 1].second));
  }
  return parts;
}

/// At most `most` of the `words` in `text`, from number `first` on; single blanks part them.
inline std::string joined(std::string_view text, const std::vector<Span>& words, size_t first, size_t most) {
  std::string some;
  for (size_t i = first; i < std::min(first + most, words.size()); ++i) {
    some += some.empty() ? "" : " ";
    some += text.substr(words[i].first, words[i].second - words[i].first);
  }
  return some;
}

/// The first words of `text`, at most so many.
inline std::string beginning(std::string_view text, size_t most) {
  return joined(text, words_in(text), 0, most);
}

/// The words of `text`, kWindow at a time; nothing if it has none.
inline std::vector<std::string> windows_of(std::string_view text) {
  const std::vector<Span> words = words_in(text);
  std::vector<std::string> windows;
  const size_t last = words.size() > kWindow ? words.size() - kWindow : 0;
  for (size_t first = 0; first < last; first += kStride) windows.push_back(joined(text, words, first, kWindow));
  if (!words.empty()) windows.push_back(joined(text, words, last, kWindow));
  return windows;
}

/// The pieces of `text`, in order, without repetition; none if the text is the only one.
inline std::vector<std::string> pieces(std::string_view text) {
  static const Regex between_sentences("[.?!;\n\u2026\u3002\uff01\uff1b\uff1f]+");
  static const Regex between_clauses(
      "[,:/|+&\u2013\u2014\u3001\uff0c\uff1a]+|[ \t\n\v\f\r](?i:and|or|then)(?=[ \t\n\v\f\r])");
  std::vector<std::string> found;
  std::set<std::string> known;
  const auto add = [&](std::string piece) {
    if (known.insert(piece).second) found.push_back(std::move(piece));
  };
  const auto add_windows = [&](std::string_view part) {
    for (std::string& window : windows_of(part)) add(std::move(window));
  };
  const std::vector<std::string_view> sentences = parts_of(text, between_sentences, true);
  std::string opening;  // of the latest sentence that is no fragment, or of the first
  for (size_t i = 0; i < sentences.size(); ++i) {
    const std::string_view sentence = sentences[i];
    const size_t words = words_in(sentence).size();
    const std::string start = beginning(sentence, kOpening);
    add_windows(sentence);
    const std::vector<std::string_view> clauses = parts_of(sentence, between_clauses, false);
    add_windows(clauses.front());
    for (size_t k = 1; k < clauses.size(); ++k) add(start + " " + beginning(clauses[k], kWindow));
    if (words < kShort) {
      if (!opening.empty()) add(opening + " " + beginning(sentence, kShort));
      const std::string_view last = sentences[std::min(i + kWindow, sentences.size()) - 1];
      const char* begin = sentence.data();
      add(beginning({begin, static_cast<size_t>(last.data() + last.size() - begin)}, kWindow));
    }
    if (opening.empty() || words >= kShort) opening = start;
  }
  const std::vector<Span> words = words_in(text);
  const size_t begin = words.empty() ? 0 : words.front().first, end = words.empty() ? 0 : words.back().second;
  const bool whole = found.size() == 1 && found[0] == text.substr(begin, end - begin);
  return whole ? std::vector<std::string>() : found;
}

}  // namespace autosteer
