// A JSON reader for skv_config.json. Numbers are doubles, exact up to 2^53.
#pragma once

#include <cctype>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

class Json {
 public:
  // Throws std::runtime_error with the place of the first mistake.
  static Json parse(const std::string& text) {
    Reader reader{text};
    Json value = reader.value(0);
    reader.space();
    if (reader.at != text.size()) reader.fail("the end");
    return value;
  }

  bool is_null() const { return kind_ == Kind::null; }

  const Json& operator[](const std::string& key) const {
    expect(Kind::object, "an object");
    const auto found = members_.find(key);
    if (found == members_.end()) throw std::runtime_error("JSON: no key \"" + key + "\"");
    return found->second;
  }

  const std::vector<Json>& items() const { return expect(Kind::array, "an array").items_; }

  const std::string& text() const { return expect(Kind::string, "a string").text_; }

  int64_t integer() const {
    const double number = expect(Kind::number, "a number").number_;
    if (!(number >= -9007199254740992.0 && number <= 9007199254740992.0) ||
        number != static_cast<double>(static_cast<int64_t>(number)))
      throw std::runtime_error("JSON: expected an integer, got " + std::to_string(number));
    return static_cast<int64_t>(number);
  }

 private:
  enum class Kind { null, boolean, number, string, array, object };

  const Json& expect(Kind kind, const char* name) const {
    if (kind_ != kind) throw std::runtime_error(std::string("JSON: expected ") + name);
    return *this;
  }

  struct Reader {
    const std::string& input;
    size_t at = 0;

    [[noreturn]] void fail(const std::string& expected) const {
      throw std::runtime_error("JSON: expected " + expected + " at byte " + std::to_string(at));
    }

    void space() {
      while (at < input.size() && std::isspace(static_cast<unsigned char>(input[at]))) ++at;
    }

    bool take(char wanted) {
      space();
      if (at >= input.size() || input[at] != wanted) return false;
      ++at;
      return true;
    }

    bool take(const char* word) {
      const std::string wanted(word);
      if (input.compare(at, wanted.size(), wanted) != 0) return false;
      at += wanted.size();
      return true;
    }

    Json value(int depth) {
      if (depth > 64) fail("no more than 64 levels");
      Json result;
      space();
      if (take('{')) {
        result.kind_ = Kind::object;
        if (take('}')) return result;
        do {
          space();
          const std::string key = string();
          if (!take(':')) fail("':'");
          result.members_[key] = value(depth + 1);
        } while (take(','));
        if (!take('}')) fail("'}'");
      } else if (take('[')) {
        result.kind_ = Kind::array;
        if (take(']')) return result;
        do result.items_.push_back(value(depth + 1));
        while (take(','));
        if (!take(']')) fail("']'");
      } else if (at < input.size() && input[at] == '"') {
        result.kind_ = Kind::string;
        result.text_ = string();
      } else if (take("true") || take("false")) {
        result.kind_ = Kind::boolean;
      } else if (!take("null")) {
        result.kind_ = Kind::number;
        char* end = nullptr;
        result.number_ = std::strtod(input.c_str() + at, &end);
        if (end == input.c_str() + at) fail("a value");
        at = static_cast<size_t>(end - input.c_str());
      }
      return result;
    }

    std::string string() {
      if (at >= input.size() || input[at] != '"') fail("a string");
      std::string result;
      for (++at; at < input.size() && input[at] != '"'; ++at) {
        if (input[at] == '\\') {
          escape(result);
        } else {
          result += input[at];
        }
      }
      if (at >= input.size()) fail("'\"'");
      ++at;
      return result;
    }

    // Appends what stands behind a backslash; the escapes of UTF-16 become UTF-8, one unit at a time.
    void escape(std::string& result) {
      static const std::string kNames = "\"\\/bfnrt", kBytes = "\"\\/\b\f\n\r\t";
      if (++at >= input.size()) fail("an escape");
      const size_t index = kNames.find(input[at]);
      if (index != std::string::npos) {
        result += kBytes[index];
        return;
      }
      if (input[at] != 'u' || at + 4 >= input.size()) fail("an escape");
      const std::string digits = input.substr(at + 1, 4);
      char* end = nullptr;
      const auto code = static_cast<unsigned>(std::strtoul(digits.c_str(), &end, 16));
      if (end != digits.c_str() + 4) fail("four hexadecimal digits");
      at += 4;
      if (code < 0x80) {
        result += static_cast<char>(code);
      } else if (code < 0x800) {
        result += static_cast<char>(0xC0 | code >> 6);
        result += static_cast<char>(0x80 | (code & 0x3F));
      } else {
        result += static_cast<char>(0xE0 | code >> 12);
        result += static_cast<char>(0x80 | (code >> 6 & 0x3F));
        result += static_cast<char>(0x80 | (code & 0x3F));
      }
    }
  };

  Kind kind_ = Kind::null;
  double number_ = 0;
  std::string text_;
  std::vector<Json> items_;
  std::map<std::string, Json> members_;
};
