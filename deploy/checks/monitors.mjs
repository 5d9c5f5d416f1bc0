// monitors.mjs FILE...: validates every PodMonitor and PrometheusRule against the Prometheus operator's schemas.
import fs from 'node:fs';
import * as yaml from 'js-yaml';
import * as models from '@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1';

let seen = 0;
for (const file of process.argv.slice(2)) {
  for (const object of yaml.loadAll(fs.readFileSync(file, 'utf8'))) {
    if (!object?.apiVersion?.startsWith('monitoring.coreos.com/')) continue;
    seen += 1;
    try {
      new models[object.kind](object).validate();
    } catch (error) {
      console.error(`${file}: ${object.kind} ${object.metadata.name}: ${error.message}`);
      process.exitCode = 1;
    }
  }
}
console.log(`${seen} monitoring objects`);
if (seen === 0) process.exitCode = 1;
