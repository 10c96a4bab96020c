package remote

import (
	"bytes"
	"cmp"
	"context"
	"crypto/md5" // what S3's ETags are made with
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"filo/layer/registry"
)

// bucket keeps a cache in an object store that speaks S3: PREFIX/manifests/NAME is the index, PREFIX/blobs/DIGEST are
// the layers, as BuildKit has it. The index is written on the condition that nobody else wrote it since it was read.
type bucket struct {
	client *minio.Client
	name   string
	names  []string // of the index, the first that there is
	index  string   // what their keys begin with
	blobs  string   // what the keys of blobs begin with
	touch  time.Duration
	now    func() time.Time

	mu            sync.Mutex
	unconditional bool   // the server does not know conditional writes
	unsure        bool   // nothing says whether the index that was read is the one that its ETag names
	written       string // ETag of the index that was written last
}

// partSize is how much of a blob is sent, and on an error sent again, in one piece.
const partSize = 16 << 20

// newBucket returns the place of s. No transfer stands still for longer than still.
func newBucket(o Options, s Spec, still time.Duration) (*bucket, error) {
	region := cmp.Or(s.attrs["region"], o.Getenv("AWS_REGION"), o.Getenv("AWS_DEFAULT_REGION"), "us-east-1")
	endpoint := cmp.Or(s.attrs["endpoint_url"], o.Getenv("AWS_ENDPOINT_URL_S3"), o.Getenv("AWS_ENDPOINT_URL"), "https://s3."+region+".amazonaws.com")
	u, err := url.Parse(endpoint)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return nil, errors.New("type=s3: endpoint_url: want https://HOST[:PORT]")
	}
	lookup := minio.BucketLookupAuto
	if s.pathStyle != nil {
		if lookup = minio.BucketLookupDNS; *s.pathStyle {
			lookup = minio.BucketLookupPath
		}
	}
	secure := u.Scheme == "https"
	transport, err := minio.DefaultTransport(secure)
	if err != nil {
		return nil, fmt.Errorf("type=s3: %w", err)
	}
	client, err := minio.New(u.Host, &minio.Options{
		Creds: credentialsOf(o, s), Secure: secure, Region: region, BucketLookup: lookup, MaxRetries: 5,
		Transport: registry.Patient(transport, still),
	})
	if err != nil {
		return nil, fmt.Errorf("type=s3: %w", err)
	}
	return &bucket{
		client: client, name: s.attrs["bucket"], names: s.names, touch: s.touch, now: o.Now,
		index: s.attrs["prefix"] + cmp.Or(s.attrs["manifests_prefix"], "manifests/"),
		blobs: s.attrs["prefix"] + cmp.Or(s.attrs["blobs_prefix"], "blobs/"),
	}, nil
}

// credentialsOf looks where other tools look: the flag, the environment, the shared file, the machine's role.
func credentialsOf(o Options, s Spec) *credentials.Credentials {
	id, secret, token := s.attrs["access_key_id"], s.attrs["secret_access_key"], s.attrs["session_token"]
	if id == "" {
		id, secret, token = o.Getenv("AWS_ACCESS_KEY_ID"), o.Getenv("AWS_SECRET_ACCESS_KEY"), o.Getenv("AWS_SESSION_TOKEN")
	}
	if id != "" {
		return credentials.NewStaticV4(id, secret, token)
	}
	file := o.Getenv("AWS_SHARED_CREDENTIALS_FILE")
	if home := o.Getenv("HOME"); file == "" && home != "" {
		file = filepath.Join(home, ".aws", "credentials")
	}
	return credentials.NewChainCredentials([]credentials.Provider{
		&credentials.FileAWSCredentials{Filename: file, Profile: cmp.Or(o.Getenv("AWS_PROFILE"), "default")},
		&credentials.IAM{},
	})
}

// read implements place.
func (b *bucket) read(ctx context.Context) (*index, string, error) {
	for _, name := range b.names {
		data, tag, err := b.whole(ctx, b.index+name)
		if isMissing(err) {
			continue
		}
		if err != nil {
			return nil, "", b.explain("read", b.index+name, err)
		}
		x, err := parseIndex(data)
		return x, tag, err
	}
	x := newIndex()
	x.missing = true
	return x, "", nil
}

// tornReads is how often an object is read that is not what its ETag names.
const tornReads = 12

// whole reads an object that is held in memory, and its ETag. Servers that keep data and ETag apart (versitygw with
// --sidecar) send for a moment the old data under the new ETag: who merges into that and writes on the condition of
// the ETag loses what the other wrote. So where an ETag is an MD5, as of objects that were put in one piece and are
// not encrypted with a key of their own, it has to be that of the data.
func (b *bucket) whole(ctx context.Context, key string) ([]byte, string, error) {
	for try := 1; ; try++ {
		data, info, err := b.small(ctx, key)
		if err != nil {
			return nil, "", err
		}
		sum := md5.Sum(data)
		sure := info.ETag == hex.EncodeToString(sum[:])
		if sure || !isMD5(info) || try == tornReads {
			b.mu.Lock()
			b.unsure = !sure
			b.mu.Unlock()
			return data, info.ETag, nil
		}
		if err := pause(ctx, try); err != nil {
			return nil, "", err
		}
	}
}

// isMD5 reports whether an object has an ETag that is to be the MD5 of its data.
func isMD5(info minio.ObjectInfo) bool {
	const encryption = "X-Amz-Server-Side-Encryption"
	own := info.Metadata.Get(encryption+"-Customer-Algorithm") != "" || strings.HasPrefix(info.Metadata.Get(encryption), "aws:kms")
	return len(info.ETag) == 2*md5.Size && !own
}

// small reads an object that is held in memory.
func (b *bucket) small(ctx context.Context, key string) ([]byte, minio.ObjectInfo, error) {
	o, err := b.client.GetObject(ctx, b.name, key, minio.GetObjectOptions{})
	if err != nil {
		return nil, minio.ObjectInfo{}, err
	}
	defer o.Close()
	data, err := io.ReadAll(io.LimitReader(o, maxIndex+1))
	if err != nil {
		return nil, minio.ObjectInfo{}, err
	}
	if len(data) > maxIndex {
		return nil, minio.ObjectInfo{}, errors.New("too large for an index")
	}
	info, err := o.Stat()
	return data, info, err
}

func isMissing(err error) bool {
	return err != nil && minio.ToErrorResponse(err).Code == minio.NoSuchKey
}

// explain makes one line of an error that may quote a request.
func (b *bucket) explain(verb, key string, err error) error {
	if r := minio.ToErrorResponse(err); r.Code != "" {
		return fmt.Errorf("%s %s/%s: %s: %s", verb, b.name, key, r.Code, r.Message)
	}
	return fmt.Errorf("%s %s/%s: %w", verb, b.name, key, err)
}

func (b *bucket) open(ctx context.Context, d ocispec.Descriptor) (io.ReadCloser, error) {
	r := &object{ctx: ctx, b: b, key: b.blobs + d.Digest.String(), size: d.Size}
	if err := r.reopen(); err != nil {
		return nil, err
	}
	return r, nil
}

// object reads an object over as many connections as it takes.
type object struct {
	ctx       context.Context
	b         *bucket
	key       string
	body      *minio.Object
	off, size int64
	failed    int
}

// objectTries is how often a transfer that breaks is taken up without getting a byte.
const objectTries = 4

func (o *object) reopen() error {
	var opts minio.GetObjectOptions
	if o.off > 0 {
		if err := opts.SetRange(o.off, 0); err != nil {
			return err
		}
	}
	body, err := o.b.client.GetObject(o.ctx, o.b.name, o.key, opts)
	if err == nil {
		if _, err = body.Stat(); err != nil { // the request is made only now
			body.Close()
		}
	}
	if err != nil {
		return o.b.explain("get", o.key, err)
	}
	o.body = body
	return nil
}

// Read implements io.Reader.
func (o *object) Read(p []byte) (int, error) {
	for {
		n, err := o.body.Read(p)
		if o.off += int64(n); n > 0 {
			o.failed = 0
		}
		if err == nil || err == io.EOF && o.off >= o.size || o.ctx.Err() != nil {
			return n, err
		}
		if o.failed++; o.failed > objectTries {
			return n, o.b.explain("get", o.key, err)
		}
		o.body.Close()
		if err := o.reopen(); err != nil {
			return n, err
		}
		if n > 0 {
			return n, nil
		}
	}
}

// Close implements io.Closer.
func (o *object) Close() error { return o.body.Close() }

// put implements place. A blob that is there and grows old is made young, so that rules which delete by age spare it.
func (b *bucket) put(ctx context.Context, d ocispec.Descriptor, open func(context.Context) (io.ReadCloser, error)) error {
	key := b.blobs + d.Digest.String()
	info, err := b.client.StatObject(ctx, b.name, key, minio.StatObjectOptions{})
	if err == nil && info.Size == d.Size {
		return b.renew(ctx, key, info)
	}
	if err != nil && !isMissing(err) {
		return b.explain("look up", key, err)
	}
	r, err := open(ctx)
	if err != nil {
		return err
	}
	defer r.Close()
	_, err = b.client.PutObject(ctx, b.name, key, r, d.Size, minio.PutObjectOptions{
		ContentType: d.MediaType, PartSize: partSize, NumThreads: 2,
	})
	if err != nil {
		return b.explain("put", key, err)
	}
	return nil
}

func (b *bucket) renew(ctx context.Context, key string, info minio.ObjectInfo) error {
	if b.now().Sub(info.LastModified) < b.touch {
		return nil
	}
	_, err := b.client.CopyObject(ctx,
		minio.CopyDestOptions{Bucket: b.name, Object: key, ReplaceMetadata: true, ContentType: info.ContentType},
		minio.CopySrcOptions{Bucket: b.name, Object: key})
	if err != nil {
		return b.explain("renew", key, err)
	}
	return nil
}

// write implements place.
func (b *bucket) write(ctx context.Context, x *index, version string) error {
	data, err := x.marshal()
	if err != nil {
		return err
	}
	key := b.index + b.names[0]
	opts := minio.PutObjectOptions{ContentType: "application/json", DisableMultipart: true}
	switch {
	case b.unconditional:
	case version == "":
		opts.SetMatchETagExcept("*")
	default:
		opts.SetMatchETag(version)
	}
	info, err := b.client.PutObject(ctx, b.name, key, bytes.NewReader(data), int64(len(data)), opts)
	switch code := minio.ToErrorResponse(err).Code; {
	case err == nil:
		b.mu.Lock()
		b.written = info.ETag
		b.mu.Unlock()
		return nil
	case code == minio.PreconditionFailed || code == "ConditionalRequestConflict" || code == minio.NoSuchKey && version != "":
		return errStale
	case code == minio.NotImplemented && !b.unconditional:
		b.unconditional = true
		return b.write(ctx, x, version)
	}
	return b.explain("put", key, err)
}

// kept implements place. A write on a condition that holds is there to stay.
func (b *bucket) kept(ctx context.Context) (bool, error) {
	if !b.unconditional && !b.unsure {
		return true, nil
	}
	if err := pause(ctx, 1); err != nil {
		return false, err
	}
	info, err := b.client.StatObject(ctx, b.name, b.index+b.names[0], minio.StatObjectOptions{})
	b.mu.Lock()
	defer b.mu.Unlock()
	return info.ETag == b.written, err
}

// doubt implements place: whether an object is there is looked up each time.
func (b *bucket) doubt(digest.Digest) {}
