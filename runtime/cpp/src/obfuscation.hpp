// Text with obfuscated letters, as its reader reads it. The C++ side of runtime/obfuscation.py, which says what each
// step is for.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <iterator>
#include <string>
#include <string_view>
#include <unordered_map>

#include "regex.hpp"
#include "unicode.hpp"

namespace autosteer {

namespace obfuscation {

struct Alphabet {
  char32_t first;  // of 26 letters
  char letter;     // what it stands for
};

constexpr std::array<Alphabet, 9> kAlphabets = {{{0x249C, 'a'},  // in parentheses
                                                 {0x24B6, 'A'},  // circled
                                                 {0x24D0, 'a'},
                                                 {0xFF21, 'A'},  // full-width
                                                 {0xFF41, 'a'},
                                                 {0x1F110, 'A'},  // in parentheses
                                                 {0x1F130, 'A'},  // squared
                                                 {0x1F150, 'A'},  // white on black
                                                 {0x1F170, 'A'}}};
constexpr char32_t kMathematical = 0x1D400, kMathematicalEnd = 0x1D6A4;  // A to Z, a to z, and again

/// Other shapes of letters, and the letters.
constexpr std::string_view kShapes =
    "ᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘꞯʀꜱᴛᴜᴠᴡʏᴢᵃᵇᶜᵈᵉᶠᵍʰⁱʲᵏˡᵐⁿᵒᵖʳˢᵗᵘᵛʷˣʸᶻᴬᴮᴰᴱᴳᴴᴵᴶᴷᴸᴹᴺᴼᴾᴿᵀᵁⱽᵂₐₑₕᵢⱼₖₗₘₙₒₚᵣₛₜᵤᵥₓ"
    "ℂℊℋℌℍℎℐℑℒℓℕℙℚℛℜℝℤℨℬℭℯℰℱℳℴℹⅅⅆⅇⅈⅉⅠⅤⅩⅬⅭⅮⅯⅰⅴⅹⅼⅽⅾⅿ€¢"
    "\xc2\x85\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009"
    "\u200a\u2028\u2029\u202f\u205f\u3000";
constexpr std::string_view kOfShapes =
    "abcdefghijklmnopqrstuvwyzabcdefghijklmnoprstuvwxyzABDEGHIJKLMNOPRTUVWaehijklmnoprstuvx"
    "CgHHHhIILlNPQRRRZZBCeEFMoiDdeijIVXLCDMivxlcdmec"
    "                   ";

/// Cyrillic, Greek, Armenian and phonetic letters, and what they look like.
constexpr const char* kLookAlikes = "АВЕКМНОРСТУХЅІЈаеорсухѕіјһкмтԁԛԝѵӏΑΒΕΖΗΙΚΜΝΟΡΤΥΧαεικνορτυχօսհոɑɡ";
constexpr std::string_view kOfLookAlikes = "ABEKMHOPCTYXSIJaeopcyxsijhkmtdqwvlABEZHIKMNOPTYXaeikvoptuxouhnag";

// In character classes: of letters, of characters that nobody sees, and of marks that stand on the letter before.
constexpr const char* kLetters = R"(A-Za-z\x{c0}-\x{24f}\x{1e00}-\x{1eff})";
constexpr const char* kInvisible =
    R"(\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x{80}-\x{84}\x{86}-\x{9f}\x{ad}\x{34f}\x{600}-\x{605}\x{61c}\x{6dd}\x{70f})"
    R"(\x{8e2}\x{115f}\x{1160}\x{17b4}\x{17b5}\x{180b}-\x{180f}\x{200b}-\x{200f}\x{202a}-\x{202e}\x{2060}-\x{206f})"
    R"(\x{2800}\x{3164}\x{fe00}-\x{fe0f}\x{feff}\x{ffa0}\x{fff9}-\x{fffc}\x{110bd}\x{110cd}\x{13430}-\x{1343f})"
    R"(\x{1bca0}-\x{1bca3}\x{1d173}-\x{1d17a}\x{e0000}-\x{e0fff})";
constexpr const char* kMarks =
    R"(\x{300}-\x{36f}\x{1ab0}-\x{1aff}\x{1dc0}-\x{1dff}\x{20d0}-\x{20ff}\x{fe20}-\x{fe2f})";

/// Signs; not those that stand between words, as dashes and slashes do.
constexpr const char* kNotInWords =
    R"(%\\^+|=#~*<>&\x{a1}-\x{ac}\x{ae}-\x{bf}\x{2010}-\x{2012}\x{2020}-\x{2027}\x{2030}-\x{205e}\x{2190}-\x{2bff})"
    R"(\x{1f000}-\x{1faff})";

/// Letters with a stroke, and those without.
constexpr const char* kStroked = "øØłŁđĐħĦŧŦ";
constexpr std::string_view kOfStroked = "oOlLdDhHtT";

constexpr size_t kUsualAccents = 5;  // plain text has them on one letter in five at most
constexpr std::string_view kDigits = "013456789@$!", kOfDigits = "oieasgtbgasi";
constexpr std::string_view kUnits[] = {
    "am", "cm", "db",  "fps", "ft", "gb", "hz",  "kb",  "kbps", "kcal", "kg", "khz", "km",  "mb", "mbps", "mg",
    "mhz", "min", "ml", "mm", "mpg", "mph", "nd", "nm", "pm", "px", "rd", "sec", "st", "tb", "th"};

inline bool is_letter(char c) {
  return ('A' <= c && c <= 'Z') || ('a' <= c && c <= 'z');
}

/// `text` with each match of `pattern` as `change` has it.
template <class Change>
std::string replaced(std::string_view text, const Regex& pattern, const Change& change) {
  std::string out;
  size_t at = 0;
  for (const auto& [first, last] : pattern.find_all(text)) {
    out += text.substr(at, first - at);
    out += change(text.substr(first, last - first));
    at = last;
  }
  return out += text.substr(at);
}

using Table = std::unordered_map<std::string, char>;  // what a character, in UTF-8, stands for

inline Table table_of(std::string_view characters, std::string_view letters) {
  Table table;
  for (const char letter : letters) {
    const size_t length = unicode::character(characters, 0);
    table.emplace(characters.substr(0, length), letter);
    characters.remove_prefix(length);
  }
  return table;
}

inline Table in_ascii() {
  Table table = table_of(kShapes, kOfShapes);
  const auto add = [&table](char32_t first, char letter, char32_t count) {
    for (char32_t n = 0; n < count; ++n) table.emplace(unicode::encoded(first + n), static_cast<char>(letter + n));
  };
  for (const Alphabet& alphabet : kAlphabets) add(alphabet.first, alphabet.letter, 26);
  for (char32_t first = kMathematical; first < kMathematicalEnd; first += 52) {
    add(first, 'A', 26);
    add(first + 26, 'a', 26);
  }
  add(0xE0020, ' ', 0x5F);  // tags: invisible copies of ASCII
  return table;
}

/// A valid text with the characters of `table` as what they stand for.
inline std::string translated(std::string_view text, const Table& table) {
  std::string out;
  for (size_t at = 0, length = 0; at < text.size(); at += length) {
    length = unicode::character(text, at);
    const auto found = length > 1 ? table.find(std::string(text.substr(at, length))) : table.end();
    found == table.end() ? void(out += text.substr(at, length)) : void(out += found->second);
  }
  return out;
}

inline int base64_value(char c) {
  if ('A' <= c && c <= 'Z') return c - 'A';
  if ('a' <= c && c <= 'z') return c - 'a' + 26;
  if (is_digit(c)) return c - '0' + 52;
  return c == '+' || c == '-' ? 62 : 63;
}

/// What a run of base64 says, if that is text in UTF-8.
inline std::optional<std::string> base64_text(std::string_view digits) {
  if (digits.size() % 4 == 1) return std::nullopt;
  std::string said;
  uint32_t bits = 0;
  for (size_t i = 0; i < digits.size(); ++i) {
    bits = bits << 6 | static_cast<uint32_t>(base64_value(digits[i]));
    if (i % 4 > 0) said += static_cast<char>(bits >> (6 - 2 * (i % 4)) & 0xFF);
  }
  const auto is_control = [](unsigned char c) { return c < ' ' && c != '\t' && c != '\n' && c != '\r'; };
  const bool text = unicode::is_valid(said) && std::none_of(said.begin(), said.end(), is_control);
  return text ? std::optional(said) : std::nullopt;
}

/// Runs of base64, of either alphabet, decoded where they are text in UTF-8.
inline std::string decoded(std::string_view text) {
  static const Regex run("[A-Za-z0-9+/_-]{16,}={0,2}");
  return replaced(text, run, [](std::string_view found) {
    return base64_text(found.substr(0, found.find('='))).value_or(std::string(found));
  });
}

inline std::string without_hidden(std::string_view text) {
  static const std::string letters = kLetters, invisible = kInvisible;
  static const Regex hidden("(?<=[" + letters + " \\t\\n])[" + invisible + kMarks + "]+|(?<![" + invisible + "])[" +
                            invisible + "]+(?=[" + letters + "])");
  return replaced(text, hidden, [](std::string_view) { return ""; });
}

/// `text` with `instead` of each match of `pattern`, if there are as many as `least`; else `text`.
inline std::string replaced_if_many(std::string_view text, const Regex& pattern, const char* instead, size_t least) {
  size_t found = 0;
  const std::string all = replaced(text, pattern, [&](std::string_view) {
    ++found;
    return instead;
  });
  return found >= least ? all : std::string(text);
}

/// Escapes such as "%20" become blanks, if there are four or more.
inline std::string not_escaped(std::string_view text) {
  static const Regex escapes("(?:%[0-9A-Fa-f]{2})+");
  return replaced_if_many(text, escapes, " ", 4);
}

/// Signs within words go, if there are two or more.
inline std::string not_parted(std::string_view text) {
  static const std::string signs = kNotInWords;
  static const Regex parted("(?<=[A-Za-z])(?:<\\|[a-z_]{1,20}\\|>|[" + signs + "]{1,3})(?=[A-Za-z])");
  return replaced_if_many(text, parted, "", 2);
}

/// Five words or more with signs between them and no blank, or fourWordsLikeThese, are parted.
inline std::string not_joined(std::string_view text) {
  static const std::string word = "(?:[A-Za-z]{2,}|[aAiI])";
  static const Regex joined("(?<![A-Za-z0-9_-])" + word + "(?:[^A-Za-z0-9 \\t-\\r]+" + word +
                            "){4,}(?![A-Za-z0-9])");
  static const Regex no_words("[^A-Za-z]+");
  static const Regex capitals("(?<![A-Za-z0-9])[A-Za-z]?[a-z]+(?:[A-Z][a-z]+|[AI]){3,}(?![A-Za-z0-9])");
  static const Regex capital("(?<=[A-Za-z])[A-Z]");
  const std::string apart = replaced(text, joined, [](std::string_view run) {
    return replaced(run, no_words, [](std::string_view) { return " "; });
  });
  return replaced(apart, capitals, [](std::string_view run) {
    return replaced(run, capital, [](std::string_view letter) { return " " + std::string(letter); });
  });
}

inline std::string without_look_alikes(std::string_view text) {
  static const Regex mixed("[A-Za-z][" + std::string(kLookAlikes) + "]|[" + kLookAlikes + "][A-Za-z]");
  static const Table table = table_of(kLookAlikes, kOfLookAlikes);
  return mixed.find(text, 0) ? translated(text, table) : std::string(text);
}

inline std::string without_accents(std::string_view text) {
  static const Regex accented("[A-Za-z][\\x{300}-\\x{36f}]+");
  static const Table strokes = table_of(kStroked, kOfStroked);
  static const Regex stroked("[" + std::string(kStroked) + "]");
  const std::string apart = replaced(unicode::nfd(text), stroked, [](std::string_view letter) {
    return strokes.at(std::string(letter)) + std::string("\u0335");
  });
  const auto letters = static_cast<size_t>(std::count_if(apart.begin(), apart.end(), is_letter));
  size_t accents = 0;
  const std::string bare = replaced(apart, accented, [&accents](std::string_view found) {
    ++accents;
    return found.substr(0, 1);
  });
  return accents * kUsualAccents > letters ? unicode::nfc(bare) : std::string(text);
}

/// Words that are spelled out, in one, if one of them has four letters or more.
inline std::string not_spelled_out(std::string_view text) {
  static const Regex spelled(
      R"((?<![A-Za-z0-9])[A-Za-z]([ \n\t._*/|+~,-])[A-Za-z013456789]\1[A-Za-z013456789]\1[A-Za-z](?![A-Za-z0-9]))");
  const auto single_letters = [](const std::string& between) {
    return Regex("(?<![A-Za-z0-9])[A-Za-z0-9]([" + between +
                 R"(])[A-Za-z0-9](?:\1[A-Za-z0-9])*(?:\1[?!])?(?![A-Za-z0-9]))");
  };
  static const Regex between_signs = single_letters("._*/|+~,-"), between_blanks = single_letters(" \\n\\t");
  if (!spelled.find(text, 0)) return std::string(text);
  const auto in_one = [](std::string_view run) {
    std::string word;
    for (size_t i = 0; i < run.size(); i += 2) word += run[i];
    return word;
  };
  return replaced(replaced(text, between_signs, in_one), between_blanks, in_one);
}

inline std::string not_drawn_out(std::string_view text) {
  static const Regex drawn_out(R"(([A-HJ-VX-Za-vx-z])\1\1+)");
  return replaced(text, drawn_out, [](std::string_view run) { return run.substr(0, 1); });
}

inline bool has_digit_for_letter(std::string_view word) {
  static const Regex within("[A-Za-z][013456789@$!]+[A-Za-z]"), in_front("\\A[013456789]+[A-Za-z]{2,}\\z");
  if (within.find(word, 0)) return true;
  if (!in_front.find(word, 0)) return false;
  std::string unit(std::find_if(word.begin(), word.end(), is_letter), word.end());
  std::transform(unit.begin(), unit.end(), unit.begin(), [](char c) { return static_cast<char>(c | 0x20); });
  return std::find(std::begin(kUnits), std::end(kUnits), unit) == std::end(kUnits);
}

inline std::string letters_for_digits(std::string_view word) {
  if (word.size() > 1 && std::all_of(word.begin(), word.end(), is_digit)) return std::string(word);  // a number
  std::string out;
  for (size_t at = 0; at < word.size(); ++at) {
    const size_t digit = kDigits.find(word[at]);
    if (word.substr(at, 2) == "11") {
      out += "ll";
      ++at;
    } else {
      out += digit == std::string_view::npos ? word[at] : kOfDigits[digit];
    }
  }
  return out;
}

/// Words of digits and letters, and single digits, in letters, if one of the words is certainly so.
inline std::string without_digits(std::string_view text) {
  static const Regex word("[A-Za-z0-9@$]+(?:!+[A-Za-z0-9@$]+)*");
  bool certain = false;
  std::string in_letters = replaced(text, word, [&](std::string_view found) {
    certain = certain || has_digit_for_letter(found);
    return letters_for_digits(found);
  });
  return certain ? in_letters : std::string(text);
}

}  // namespace obfuscation

/// A valid text in plain letters; the text itself if nothing in it is obfuscated.
inline std::string deobfuscated(const std::string& text) {
  using namespace obfuscation;
  static const Table ascii = in_ascii();
  const std::string composed = unicode::nfc(text);
  std::string plain = not_parted(without_hidden(not_joined(not_escaped(translated(decoded(composed), ascii)))));
  plain = not_drawn_out(not_spelled_out(without_accents(without_look_alikes(plain))));
  plain = without_digits(plain);
  return plain == composed ? text : plain;
}

}  // namespace autosteer
