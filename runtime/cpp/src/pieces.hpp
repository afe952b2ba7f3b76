// The pieces of a text that the gate reads one by one, so that harmless words around a request do not drown it. The C++
// side of runtime/pieces.py, which says what they are.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "regex.hpp"

namespace autosteer {

constexpr size_t kFewestWords = 3;           // of a piece, if the text has so many
constexpr size_t kShort = 5;                 // words; a sentence of fewer is read with what follows, too
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

/// The words of `text`, kWindow at a time, in which single blanks part them; at most so many windows.
inline std::vector<std::string> windows_of(std::string_view text, size_t most = SIZE_MAX) {
  const std::vector<Span> words = words_in(text);
  std::vector<std::string> windows;
  const size_t last = words.size() > kWindow ? words.size() - kWindow : 0;
  for (size_t first = 0; !words.empty() && windows.size() < most; first = std::min(first + kStride, last)) {
    std::string window;
    for (size_t i = first; i < std::min(first + kWindow, words.size()); ++i) {
      window += window.empty() ? "" : " ";
      window += text.substr(words[i].first, words[i].second - words[i].first);
    }
    windows.push_back(std::move(window));
    if (first == last) break;
  }
  return windows;
}

/// The pieces of `text`, in order, without repetition; none if the text is the only one.
inline std::vector<std::string> pieces(std::string_view text) {
  static const Regex sentence_ends("[^.?!;\n\u2026\u3002\uff01\uff1b\uff1f]*[.?!;\n\u2026\u3002\uff01\uff1b\uff1f]*");
  static const Regex clause_ends("[^,:/|\u2013\u2014\u3001\uff0c\uff1a]*[,:/|\u2013\u2014\u3001\uff0c\uff1a]*");
  std::vector<std::string> found;
  std::set<std::string> known;
  const auto add = [&](std::vector<std::string> windows) {
    for (std::string& window : windows) {
      if (known.insert(window).second) found.push_back(std::move(window));
    }
  };
  const std::vector<std::string_view> sentences = parts_of(text, sentence_ends);
  for (size_t i = 0; i < sentences.size(); ++i) {
    const size_t words = words_in(sentences[i]).size();
    add(windows_of(sentences[i]));
    if (words > kWindow) {
      for (const std::string_view clause : parts_of(sentences[i], clause_ends)) add(windows_of(clause));
    }
    if (words < kShort && i + 1 < sentences.size()) {
      const std::string_view& last = sentences[std::min(i + kWindow, sentences.size()) - 1];
      const char* begin = sentences[i].data();
      add(windows_of({begin, static_cast<size_t>(last.data() + last.size() - begin)}, 1));
    }
  }
  const std::vector<Span> words = words_in(text);
  const bool whole = found.size() == 1 &&
                     found[0] == text.substr(words.front().first, words.back().second - words.front().first);
  return whole ? std::vector<std::string>() : found;
}

}  // namespace autosteer
