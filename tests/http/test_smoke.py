from house import *
async def test_x(house):
    r = await house.post()
    print(r.status_code, r.headers, r.content)
    async with house.client() as c:
        for p in ["/", "/health", "/metrics", "/cluster/status", "/v1/models", "/models/m", "/v1/models/a/b", "/nope", "/v1/models/", "//v1/models"]:
            r = await c.get(p); print(p, r.status_code, r.headers, r.text[:300])
        r = await c.get("/v1/chat/completions"); print(r.status_code, r.headers, r.text[:300])
        r = await c.options("/v1/chat/completions"); print(r.status_code, r.headers, r.text[:300])
        r = await c.head("/v1/models"); print(r.status_code, r.headers, r.text[:300])
    assert 0
