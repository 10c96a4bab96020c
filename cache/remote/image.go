package remote

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/containerd/platforms"
	"github.com/moby/buildkit/cache/remotecache/v1/types"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"filo/cache"
	"filo/layer"
)

// Inline returns what type=inline puts into the config of an image with the given layers: the records of the steps
// that made them.
func Inline(made []Made, layers []layer.Layer) ([]byte, error) {
	at := map[layer.Layer]int{}
	for i, l := range layers {
		at[l] = i
	}
	records := []cacheimporttypes.CacheRecord{}
	for _, m := range made {
		i, ok := at[m.Layer]
		if !ok || !m.Shipped {
			continue
		}
		// A chain is exactly the layers it lists, a plain result would stand for those below as well.
		records = append(records, cacheimporttypes.CacheRecord{
			Digest:         digest.Digest(m.Key),
			ChainedResults: []cacheimporttypes.ChainedResult{{LayerIndexes: []int{i}, CreatedAt: utc(m.Created)}},
		})
	}
	data, err := json.Marshal(records)
	if err != nil {
		return nil, fmt.Errorf("encode inline cache: %w", err)
	}
	return data, nil
}

// readImage reads the records inside an image, or inside those of an index that fit the platform.
func (p *registryPlace) readImage(ctx context.Context, m *manifest) (*index, error) {
	if m.Config.Digest != "" {
		return p.readConfig(ctx, m)
	}
	match := platforms.Only(p.platform)
	x := newIndex()
	for _, d := range m.Manifests {
		if d.Platform == nil || !match.Match(*d.Platform) {
			continue
		}
		_, data, err := p.client.Manifest(ctx, p.ref, d.Digest)
		if err != nil {
			return nil, err
		}
		one, err := parseDocument(data)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", p.ref, err)
		}
		y, err := p.readConfig(ctx, one)
		if err != nil {
			return nil, err
		}
		x = x.merge(y)
	}
	return x, nil
}

func (p *registryPlace) readConfig(ctx context.Context, m *manifest) (*index, error) {
	data, err := p.small(ctx, m.Config)
	if err != nil {
		return nil, err
	}
	p.know(m.Layers)
	return parseInline(data, m.Layers)
}

// parseInline reads the records in the config of an image with the given layers. An image without any has none.
func parseInline(config []byte, layers []ocispec.Descriptor) (*index, error) {
	var img struct {
		RootFS ocispec.RootFS `json:"rootfs"`
		Cache  []byte         `json:"moby.buildkit.cache.v0"`
	}
	if err := json.Unmarshal(config, &img); err != nil {
		return nil, fmt.Errorf("read image config: %w", err)
	}
	x := newIndex()
	if img.Cache == nil || len(img.RootFS.DiffIDs) != len(layers) {
		return x, nil
	}
	var records []cacheimporttypes.CacheRecord
	if err := json.Unmarshal(img.Cache, &records); err != nil {
		return nil, fmt.Errorf("read inline cache: %w", err)
	}
	for _, r := range records {
		if len(r.Inputs) > 0 || len(r.ChainedResults) != 1 || len(r.ChainedResults[0].LayerIndexes) != 1 || !valid(r.Digest) {
			continue
		}
		i := r.ChainedResults[0].LayerIndexes[0]
		if i < 0 || i >= len(layers) {
			continue
		}
		e := entry{diffID: img.RootFS.DiffIDs[i], created: r.ChainedResults[0].CreatedAt.Unix()}
		e.blob = ocispec.Descriptor{MediaType: ociType(layers[i].MediaType), Digest: layers[i].Digest, Size: layers[i].Size}
		if e.valid() {
			x.add(cache.Key(r.Digest), e)
		}
	}
	return x, nil
}
