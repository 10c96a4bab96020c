package dockerfile

import (
	"fmt"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/shell"
)

// lexer expands words, and knows its escape character.
type lexer struct {
	*shell.Lex
	escape rune
}

func newLexer(escape rune) lexer { return lexer{shell.NewLex(escape), escape} }

func (f *File) lex() lexer { return newLexer(f.escape) }

// A Dockerfile of a few lines could otherwise ask for more memory than there is: ENV A=$A$A, forty times.
const (
	maxWord    = 1 << 18 // bytes that variables may add to one word
	maxReplace = 1 << 24 // bytes that replacing in a word might make at worst
	maxStage   = 1 << 26 // bytes of text that a stage may come to
	maxHeld    = 1 << 22 // entries that the lists in a stage's configs may come to; each config has its own
)

// expand expands a word; a result of an absurd size is an error.
func (l lexer) expand(word string, vars shell.EnvGetter) (shell.ProcessWordResult, error) {
	if l.worst(word, vars) > int64(len(word)+maxReplace) {
		return shell.ProcessWordResult{}, fmt.Errorf("expand %.20q: the result could be too large", word)
	}
	c := &counted{EnvGetter: vars}
	res, err := l.ProcessWordWithMatches(word, c)
	if err == nil && c.n > maxWord {
		err = fmt.Errorf("expand %.20q: the variables in it hold more than %d bytes", word, maxWord)
	}
	return res, err
}

// plain reports whether any lexer leaves text as it is, which is so for most. It does not know all of them.
func plain(text string) bool {
	for i := range len(text) {
		if c := text[i]; c < ' ' || c > '~' || strings.IndexByte("$'\"<\\`", c) >= 0 {
			return false
		}
	}
	return true
}

// counted is an env that counts what it hands out and stops at maxWord.
type counted struct {
	shell.EnvGetter
	n int
}

func (c *counted) Get(k string) (string, bool) {
	v, ok := c.EnvGetter.Get(k)
	if c.n += len(v); c.n > maxWord {
		return "", ok
	}
	return v, ok
}

// brace is an open ${ while a word is measured.
type brace struct {
	size  int64 // of what stands in it
	times int64 // how often that can appear in the result
	quote rune  // open in it; 0 for none
}

// worst returns a size that the result of a word with ${A//pattern/replacement} in it will not exceed, for each of
// A's bytes may become a replacement. Where it cannot know how the lexer will read the word it takes more.
func (l lexer) worst(word string, vars shell.EnvGetter) int64 {
	if !strings.Contains(word, "//") {
		return int64(len(word))
	}
	const enough = maxReplace << 8 // more makes no difference, and does not overflow when multiplied
	stack := []brace{{times: 1}}
	closeTop := func() {
		top := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		into := &stack[len(stack)-1]
		into.size = min(enough, into.size+top.size*top.times)
	}
	skip := false
	for i, r := range word {
		top := &stack[len(stack)-1]
		top.size++
		switch {
		case skip:
			skip = false
		case r == l.escape:
			skip = true
		case r == '$':
			name, open, all := variableAt(word[i+1:])
			v, _ := vars.Get(name)
			top.size += int64(len(v))
			if open && all {
				stack = append(stack, brace{times: int64(min(len(v), maxWord)) + 1})
			} else if open {
				stack = append(stack, brace{times: 1})
			}
		case len(stack) > 1 && (r == '\'' || r == '"') && (top.quote == 0 || top.quote == r):
			top.quote ^= r
		case len(stack) > 1 && r == '}' && top.quote == 0:
			closeTop()
		}
	}
	for len(stack) > 1 {
		closeTop()
	}
	return stack[0].size
}

// variableAt reads what follows a $: a name, whether in braces, and whether all of a pattern is to be replaced in it.
func variableAt(text string) (name string, open, all bool) {
	text, open = strings.CutPrefix(text, "{")
	n := strings.IndexFunc(text, func(r rune) bool {
		return r != '_' && (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z')
	})
	if n < 0 {
		return text, open, false
	}
	return text[:n], open, open && strings.HasPrefix(text[n:], "//")
}
