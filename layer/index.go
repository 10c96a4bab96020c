package layer

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"iter"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"sync"
	"unsafe"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// An index file is
//
//	"filoidx2"              magic and version
//	uint32                  CRC-32C of all that follows
//	uint32 n                number of records
//	uint32                  how many bytes the implied directories take
//	implied directories     see impliedDirs
//	n × uint32              where each record starts, counted from the first
//	records                 in canonical order
//
// little endian; a record is path, type, and the fields its type has, as
// varints and length-prefixed strings. Only a record that is asked for is
// decoded, and its strings share the file's memory: base images have hundreds
// of thousands of entries of which a build reads a few.
//
// That holds for the file as well: a big one that was found whole since the
// last boot (index.whole says so) is mapped and not read through again.
const (
	indexMagic  = "filoidx2"
	indexHeader = len(indexMagic) + 12
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

var errDamagedIndex = errors.New("damaged index")

// index is the entry list of one layer; it does not change.
type index struct {
	table   string // offsets, 4 bytes each
	records string

	impliedOnce sync.Once
	implied     []string // see impliedDirs
}

// index returns the entry list of l: from memory, from disk, or made from a
// blob of l, which is fetched if it is only promised.
func (s *Store) index(ctx context.Context, l Layer) (*index, error) {
	if err := checkDigest(l.DiffID); err != nil {
		return nil, fmt.Errorf("read layer: %w", err)
	}
	if x := s.cachedIndex(l); x != nil {
		return x, nil
	}
	if x, err := s.loadIndex(l); err == nil {
		return x, nil
	}
	if err := s.obtain(ctx, l, need{}); err != nil {
		return nil, err
	}
	if x := s.cachedIndex(l); x != nil {
		return x, nil
	}
	return s.loadIndex(l)
}

func (s *Store) cachedIndex(l Layer) *index {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.indexes[l.DiffID]
}

func (s *Store) cacheIndex(l Layer, x *index) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.indexes[l.DiffID] = x
}

// loadIndex reads the index file of l. A damaged file is an error that wraps
// errDamagedIndex.
func (s *Store) loadIndex(l Layer) (*index, error) {
	x, err := s.openIndex(filepath.Join(s.layerDir(l), "index"))
	if errors.Is(err, errDamagedIndex) {
		s.repaired("entry list of layer %s", l.DiffID)
	}
	if err != nil {
		return nil, err
	}
	s.cacheIndex(l, x)
	s.touch(s.layerDir(l))
	return x, nil
}

// mappedIndex is the size from which it is cheaper to map an index than to read it.
const mappedIndex = 1 << 20

func (s *Store) openIndex(path string) (*index, error) {
	info, err := os.Stat(path)
	if err != nil || info.Size() < mappedIndex {
		return readIndex(path)
	}
	seal, err := s.seal(path)
	if err != nil {
		return readIndex(path)
	}
	if known, err := os.ReadFile(path + ".whole"); err == nil && string(known) == seal {
		if x, err := mapIndex(path); err == nil {
			return x, nil
		}
	}
	x, err := readIndex(path)
	if err != nil {
		return nil, err
	}
	if again, err := s.seal(path); err == nil && again == seal {
		_ = s.putFile(path+".whole", []byte(seal)) // else the next process looks through it again
	}
	return x, nil
}

// seal names a file's state: what is written to it changes its times, and a
// power cut comes with a new boot.
func (s *Store) seal(path string) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return "", err
	}
	if s.origin.Boot == "" {
		return "", errors.New("boot is not known")
	}
	return fmt.Sprintln(s.origin.Boot, st.Dev, st.Ino, st.Size, st.Mtim, st.Ctim), nil
}

// mapIndex maps an index that is known to be whole. It stays mapped: what was
// read of it may be in use for as long as the process lives. Nobody shortens
// the file, it is only ever replaced.
func mapIndex(path string) (*index, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	b, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_PRIVATE)
	if err != nil {
		return nil, err
	}
	return splitIndex(unsafe.String(unsafe.SliceData(b), len(b)))
}

func readIndex(path string) (*index, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	var text strings.Builder
	text.Grow(int(info.Size()))
	if _, err := io.Copy(&text, f); err != nil {
		return nil, err
	}
	x, err := parseIndex(text.String())
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return x, nil
}

func parseIndex(text string) (*index, error) {
	if len(text) < indexHeader {
		return nil, errDamagedIndex
	}
	if fixed32(text[len(indexMagic):]) != sumString(text[len(indexMagic)+4:]) {
		return nil, errDamagedIndex
	}
	return splitIndex(text)
}

// splitIndex is parseIndex without the checksum.
func splitIndex(text string) (*index, error) {
	if len(text) < indexHeader || text[:len(indexMagic)] != indexMagic {
		return nil, errDamagedIndex
	}
	n := uint64(fixed32(text[len(indexMagic)+4:]))
	implied := uint64(fixed32(text[len(indexMagic)+8:]))
	rest := text[indexHeader:]
	if n*4+implied > uint64(len(rest)) {
		return nil, errDamagedIndex
	}
	x := &index{table: rest[implied : implied+n*4], records: rest[implied+n*4:]}
	d := decoder{rest: rest[:implied]}
	x.impliedOnce.Do(func() {
		for d.rest != "" && !d.bad {
			x.implied = append(x.implied, d.text())
		}
	})
	if d.bad {
		return nil, errDamagedIndex
	}
	return x, nil
}

func sumString(s string) uint32 {
	var sum uint32
	var buf [32 << 10]byte
	for len(s) > 0 {
		n := copy(buf[:], s)
		sum = crc32.Update(sum, castagnoli, buf[:n])
		s = s[n:]
	}
	return sum
}

func fixed32(s string) uint32 {
	return uint32(s[0]) | uint32(s[1])<<8 | uint32(s[2])<<16 | uint32(s[3])<<24
}

// encode is the index as a file.
func (x *index) encode() []byte {
	var implied []byte
	for _, dir := range x.impliedDirs() {
		implied = appendText(implied, dir)
	}
	b := bytes.NewBuffer(make([]byte, 0, indexHeader+len(implied)+len(x.table)+len(x.records)))
	b.WriteString(indexMagic)
	b.Write(make([]byte, 4))
	b.Write(binary.LittleEndian.AppendUint32(nil, uint32(x.len())))
	b.Write(binary.LittleEndian.AppendUint32(nil, uint32(len(implied))))
	b.Write(implied)
	b.WriteString(x.table)
	b.WriteString(x.records)
	file := b.Bytes()
	sum := crc32.Checksum(file[len(indexMagic)+4:], castagnoli)
	binary.LittleEndian.PutUint32(file[len(indexMagic):], sum)
	return file
}

// comparePaths orders paths canonically: component by component, which is to
// say with '/' below every other byte, and "." first.
func comparePaths(a, b string) int {
	if a == "." || b == "." {
		switch {
		case a == b:
			return 0
		case a == ".":
			return -1
		}
		return 1
	}
	n := min(len(a), len(b))
	for i := range n {
		if a[i] == b[i] {
			continue
		}
		switch {
		case a[i] == '/':
			return -1
		case b[i] == '/':
			return 1
		case a[i] < b[i]:
			return -1
		}
		return 1
	}
	return len(a) - len(b)
}

// beneath says whether path is inside directory dir, at any depth.
func beneath(path, dir string) bool {
	if dir == "." {
		return path != "."
	}
	return len(path) > len(dir) && path[len(dir)] == '/' && path[:len(dir)] == dir
}

// find returns the entry at path, of any type but Opaque.
func (x *index) find(path string) (Entry, bool) {
	i := x.search(path)
	p, t := x.head(i)
	if i >= x.len() || p != path || t == Opaque {
		return Entry{}, false
	}
	return x.entry(i)
}

// children yields the entries directly in dir, in order. A directory that is
// only named as the parent of others comes as an Implied one.
func (x *index) children(dir string) iter.Seq[Entry] {
	return func(yield func(Entry) bool) {
		i := x.search(dir)
		for n := x.len(); i < n; {
			path, t := x.head(i)
			if path == dir {
				i++
				continue
			}
			if !beneath(path, dir) {
				return
			}
			name := childOf(path, dir)
			e, ok := Entry{Type: Dir, Path: name, Mode: 0o755, Implied: true}, true
			if name == path && t != Opaque {
				e, ok = x.entry(i)
			}
			if ok && !yield(e) {
				return
			}
			i = x.after(i, name)
		}
	}
}

// childOf is the ancestor of path, or path itself, that is directly in dir.
func childOf(path, dir string) string {
	start := len(dir) + 1
	if dir == "." {
		start = 0
	}
	if j := strings.IndexByte(path[start:], '/'); j >= 0 {
		return path[:start+j]
	}
	return path
}

// after is the first record from i on that is neither path nor beneath it.
func (x *index) after(i int, path string) int {
	inside := func(i int) bool {
		p, _ := x.head(i)
		return p == path || beneath(p, path)
	}
	// Most directories are small: gallop before searching.
	step := 1
	for i < x.len() && inside(i) {
		if next := i + step; next < x.len() && inside(next) {
			i, step = next, step*2
			continue
		}
		end := min(i+step, x.len())
		return i + 1 + sort.Search(end-i-1, func(k int) bool { return !inside(i + 1 + k) })
	}
	return i
}

// all yields every entry, Opaque ones included, in canonical order.
func (x *index) all() iter.Seq[Entry] {
	return func(yield func(Entry) bool) {
		for i := range x.len() {
			if e, ok := x.entry(i); ok && !yield(e) {
				return
			}
		}
	}
}

// len is the number of records.
func (x *index) len() int { return len(x.table) / 4 }

// search is the first record whose path is not below path.
func (x *index) search(path string) int {
	return sort.Search(x.len(), func(i int) bool {
		p, _ := x.head(i)
		return comparePaths(p, path) >= 0
	})
}

// head decodes path and type of record i; "" and 0 if there is none.
func (x *index) head(i int) (string, Type) {
	d := x.decoder(i)
	path := d.text()
	return path, Type(d.byte())
}

func (x *index) decoder(i int) decoder {
	if i < 0 || i >= x.len() {
		return decoder{bad: true}
	}
	at := fixed32(x.table[4*i:])
	if uint64(at) > uint64(len(x.records)) {
		return decoder{bad: true}
	}
	return decoder{rest: x.records[at:]}
}

// entry decodes record i.
func (x *index) entry(i int) (Entry, bool) {
	d := x.decoder(i)
	e := d.attributes()
	if e.Type == Regular {
		e.Digest = d.digest()
	}
	if e.Type == Whiteout || e.Type == Opaque {
		return e, !d.bad
	}
	for n := d.uint(); n > 0 && !d.bad; n-- {
		if e.Xattrs == nil {
			e.Xattrs = map[string]string{}
		}
		name := d.text()
		e.Xattrs[name] = d.text()
	}
	return e, !d.bad
}

// attributes decodes what stat would tell of record i, and allocates nothing.
func (x *index) attributes(i int) (Entry, bool) {
	d := x.decoder(i)
	e := d.attributes()
	return e, !d.bad
}

// decoder reads a record; after the first thing that does not fit, bad is set
// and every read returns zero.
type decoder struct {
	rest string
	bad  bool
}

func (d *decoder) take(n uint64) string {
	if d.bad || n > uint64(len(d.rest)) {
		d.bad = true
		return ""
	}
	s := d.rest[:n]
	d.rest = d.rest[n:]
	return s
}

func (d *decoder) byte() byte {
	s := d.take(1)
	if d.bad {
		return 0
	}
	return s[0]
}

func (d *decoder) uint() uint64 {
	var v uint64
	for shift := 0; shift < 64; shift += 7 {
		b := d.byte()
		v |= uint64(b&0x7f) << shift
		if b < 0x80 {
			return v
		}
	}
	d.bad = true
	return 0
}

func (d *decoder) int() int64 {
	v := d.uint()
	return int64(v>>1) ^ -int64(v&1)
}

// attributes reads a record but for its digest and extended attributes.
func (d *decoder) attributes() Entry {
	e := Entry{Path: d.text(), Type: Type(d.byte())}
	if e.Type == Whiteout || e.Type == Opaque {
		return e
	}
	e.Mode = uint32(d.uint())
	e.UID, e.GID = int(d.uint()), int(d.uint())
	e.ModTime = d.int()
	switch e.Type {
	case Regular:
		e.Size = int64(d.uint())
	case Symlink, Hardlink:
		e.Link = d.text()
	case Char, Block:
		e.Major, e.Minor = uint32(d.uint()), uint32(d.uint())
	}
	return e
}

func (d *decoder) text() string { return d.take(d.uint()) }

func (d *decoder) digest() digest.Digest {
	raw := d.take(32)
	if d.bad {
		return ""
	}
	var buf [7 + 64]byte
	copy(buf[:], "sha256:")
	hex.Encode(buf[7:], []byte(raw))
	return digest.Digest(buf[:])
}

// indexBuilder collects records that come in canonical order.
type indexBuilder struct {
	table, records []byte
	last           string
	lastType       Type
}

var errOrder = errors.New("not in canonical order")

// add appends e, whose path must come after the last one's; an Opaque may
// follow its Dir.
func (b *indexBuilder) add(e Entry) error {
	if len(b.table) > 0 {
		c := comparePaths(b.last, e.Path)
		if c > 0 || c == 0 && (e.Type != Opaque || b.lastType != Dir) {
			return errOrder
		}
	}
	if uint64(len(b.records)) > 1<<32-1<<21 {
		return errors.New("layer has too many entries")
	}
	b.last, b.lastType = e.Path, e.Type
	b.table = binary.LittleEndian.AppendUint32(b.table, uint32(len(b.records)))
	b.records = appendText(b.records, e.Path)
	b.records = append(b.records, byte(e.Type))
	if e.Type == Whiteout || e.Type == Opaque {
		return nil
	}
	return b.addFields(e)
}

func (b *indexBuilder) addFields(e Entry) error {
	r := binary.AppendUvarint(b.records, uint64(e.Mode))
	r = binary.AppendUvarint(r, uint64(e.UID))
	r = binary.AppendUvarint(r, uint64(e.GID))
	r = binary.AppendVarint(r, e.ModTime)
	switch e.Type {
	case Regular:
		r = binary.AppendUvarint(r, uint64(e.Size))
		raw, err := hex.DecodeString(e.Digest.Encoded())
		if err != nil || len(raw) != 32 {
			return fmt.Errorf("digest %s: not sha256", e.Digest)
		}
		r = append(r, raw...)
	case Symlink, Hardlink:
		r = appendText(r, e.Link)
	case Char, Block:
		r = binary.AppendUvarint(r, uint64(e.Major))
		r = binary.AppendUvarint(r, uint64(e.Minor))
	}
	r = binary.AppendUvarint(r, uint64(len(e.Xattrs)))
	if len(e.Xattrs) > 0 {
		for _, name := range slices.Sorted(maps.Keys(e.Xattrs)) {
			r = appendText(r, name)
			r = appendText(r, e.Xattrs[name])
		}
	}
	b.records = r
	return nil
}

func appendText(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

// find returns an entry added before.
func (b *indexBuilder) find(path string) (Entry, bool) {
	i := sort.Search(len(b.table)/4, func(i int) bool {
		d := decoder{rest: b.recordText(i)}
		return comparePaths(d.text(), path) >= 0
	})
	if i >= len(b.table)/4 {
		return Entry{}, false
	}
	one := index{table: "\x00\x00\x00\x00", records: b.recordText(i)}
	e, ok := one.entry(0)
	return e, ok && e.Path == path && e.Type != Opaque
}

func (b *indexBuilder) recordText(i int) string {
	at := binary.LittleEndian.Uint32(b.table[4*i:])
	end := uint32(len(b.records))
	if next := 4 * (i + 1); next < len(b.table) {
		end = binary.LittleEndian.Uint32(b.table[next:])
	}
	return string(b.records[at:end])
}

// finish returns the index, in b's own memory: nothing can be added any more.
func (b *indexBuilder) finish() *index {
	text := func(p []byte) string { return unsafe.String(unsafe.SliceData(p), len(p)) }
	return &index{table: text(b.table), records: text(b.records)}
}

// putIndex stores x as the index of l and remembers it.
func (s *Store) putIndex(l Layer, x *index) error {
	path := filepath.Join(s.layerDir(l), "index")
	if _, err := readIndex(path); err != nil {
		data := x.encode()
		if err := s.putFile(path, data); err != nil {
			return fmt.Errorf("store index of %s: %w", l.DiffID, err)
		}
		if seal, err := s.seal(path); err == nil && len(data) >= mappedIndex {
			_ = s.putFile(path+".whole", []byte(seal))
		}
	}
	s.cacheIndex(l, x)
	return nil
}

// ReadFile is os.ReadFile for small files of the state directory, of which there are some for each layer. Half of what that
// asks of the kernel is whether the file is one to wait for.
func ReadFile(path string) ([]byte, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	for err == unix.EINTR {
		fd, err = unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	data := make([]byte, 0, 1024)
	for {
		n, err := unix.Read(fd, data[len(data):cap(data)])
		switch {
		case err == unix.EINTR:
		case err != nil:
			return nil, &fs.PathError{Op: "read", Path: path, Err: err}
		case n == 0:
			return data, nil
		}
		data = slices.Grow(data[:len(data)+max(n, 0)], 512)
	}
}

// putFile makes or replaces a file of the store; its directory is made as well.
func (s *Store) putFile(path string, data []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.CreateTemp(s.tmp, filepath.Base(path)+"-")
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Chmod(0o644), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}

var errNotHere = fmt.Errorf("layer is not in the store: %w", fs.ErrNotExist)
